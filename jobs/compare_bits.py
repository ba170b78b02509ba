"""`quantbatch compare` as a Ray job.

    ray job submit --working-dir . -- python jobs/compare_bits.py configs/quickstart.yaml --bits 8,4

Takes what `quantbatch compare` takes. The input is read here and the report is written here, on the
head; the models run in one process where a replica of the job would, on a card of the cluster. The
last line that it prints is one JSON document with the report.
"""

from quantbatch.cli import main

if __name__ == "__main__":
    import sys

    main(["compare", "--cluster", "--json", *sys.argv[1:]])
