"""The benchmarks of the engine and of loading: what `bench.py engine`, `engine-job`, `peers` and
`loading` run.

workload.py    rows of fixed lengths, from fixed seeds
model.py       a Llama-style model of 27.5 million random parameters
contenders.py  ours, and what a user of transformers would write instead
paged.py       transformers' own continuous batching, with SDPA and with a flash-style function
outside.py     engines of other packages, where they are installed
race.py        contenders in turn over the same rows: tokens per second, and whether they agree
loads.py       loading quantized weights: at load, from a cache on the disk, from one on S3
whole.py       a whole job through Ray against its engine alone
verdicts.py    what is read out of the figures
"""
