"""The benchmark of a card: what `bench.py gpu` runs; needs neither Ray nor a network.

commands.py    the sub-commands, each of which can run alone
record.py      results as lines of JSON, and as files
shapes.py      models of known shapes with random weights, made on the device
engines.py     engines as a replica makes them, from the memory plan
memory.py      planned memory against measured
oom.py         memory that really runs out, and no row lost
speed.py       output tokens per second against what else there is; contenders.py runs them in parts
paged.py       transformers' continuous batching on a card
labels.py      labels, scores and vectors against generating and padded loops; forms, free text
floor.py       decode steps against the memory's bandwidth, prefill against the matrix rate
profiling.py   which kernels the time goes to
fused.py       our 4-bit kernel against bitsandbytes, by matrix and in decode steps
share.py       two replicas on one card against one
loading.py     loading from the cache of quantized weights against quantizing

On a CPU the commands rehearse with `--shape tiny`, and leave out what needs a card.
"""
