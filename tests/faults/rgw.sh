#!/bin/bash
# A real S3 server on this machine: Ceph's object gateway (RGW) over one monitor and one store in memory.
#
#   rgw.sh FOLDER PORT MONITOR_PORT
#
# It is unpacked from the packages of Debian or Ubuntu, by the machine's own apt configuration, into FOLDER
# (60 MB to get, 240 MB on disk), without installing anything. It serves on 127.0.0.1:PORT to the user whose
# access key and secret are both "testing", keeps everything in memory, and ends with this script.
# Ceph 16 honours If-None-Match on PutObject, but not where an upload in parts ends, and answers 412 to every If-Match.
set -eu
folder=$1 port=$2 monitor=$3
mkdir -p "$folder"
cd "$folder"
root=$folder/root data=$folder/data
lib=$root/usr/lib/$(dpkg-architecture -qDEB_HOST_MULTIARCH 2>/dev/null || echo x86_64-linux-gnu)

if [ ! -e root/done ]; then
    mkdir -p debs root
    # What an installation would bring, less what is for disks that are real.
    names=$(apt-get install --simulate --no-install-recommends radosgw ceph-mon ceph-osd |
        awk '/^Inst/ { print $2 }' |
        grep -vxE 'cryptsetup-bin|dmeventd|dmidecode|gdisk|hdparm|lvm2|nvme-cli|parted|smartmontools|sudo|uuid-runtime|xfsprogs')
    # shellcheck disable=SC2086 # names of packages
    (cd debs && apt-get -q download $names)
    for package in debs/*.deb; do dpkg -x "$package" root; done
    touch root/done
fi

export PATH=$root/usr/bin:$PATH CEPH_CONF=$data/ceph.conf PYTHONPATH=$root/usr/lib/python3/dist-packages
export LD_LIBRARY_PATH=$lib:$lib/ceph:$root/lib/${lib##*/}:$root/usr/lib/ceph
rm -rf "$data"
mkdir -p "$data/run" "$data/mon" "$data/osd"
cat > "$CEPH_CONF" <<END
[global]
fsid = 4f8b1c5e-3c1f-4c7c-9a51-0a4f6ab1f001
mon host = v1:127.0.0.1:$monitor
public network = 127.0.0.0/8
auth cluster required = none
auth service required = none
auth client required = none
run dir = $data/run
admin socket = $data/run/\$name.asok
log file = $data/\$name.log
pid file =
keyring = $data/keyring
mon data = $data/mon
osd data = $data/osd
osd objectstore = memstore
memstore device bytes = 2147483648
osd class dir = $lib/rados-classes
erasure code dir = $lib/ceph/erasure-code
plugin dir = $lib/ceph
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 1000
mon pg warn min per osd = 0
rgw frontends = beast endpoint=127.0.0.1:$port
rgw enable usage log = false
rgw thread pool size = 64
END

started=()
trap 'kill "${started[@]}" 2>/dev/null; wait' EXIT
trap 'exit 0' TERM INT

ceph-authtool --create-keyring keyring --gen-key -n mon. --cap mon 'allow *' >/dev/null
mv keyring "$data/keyring"
monmaptool --create --fsid 4f8b1c5e-3c1f-4c7c-9a51-0a4f6ab1f001 --addv a "v1:127.0.0.1:$monitor" "$data/monmap" >/dev/null
ceph-mon --mkfs -i a --monmap "$data/monmap" --keyring "$data/keyring"
ceph-mon -i a -f & started+=($!)
uuid=4f8b1c5e-3c1f-4c7c-9a51-0a4f6ab1f002
number=$(/usr/bin/python3 "$root/usr/bin/ceph" --connect-timeout 60 osd create $uuid)
ceph-osd --mkfs -i "$number" --osd-uuid $uuid
for _ in 1 2 3 4 5 6 7 8; do
    # Now and then it asks the monitor before it knows its cluster, is told "wrong fsid", and ends.
    ceph-osd -i "$number" -f & osd=$!
    sleep 4
    kill -0 $osd 2>/dev/null && break
done
started+=("$osd")
radosgw-admin user create --uid testing --display-name testing --access-key testing --secret-key testing >/dev/null
radosgw -n client.rgw -f & started+=($!)
echo "serving on 127.0.0.1:$port"
wait -n
