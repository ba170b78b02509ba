"""`quantbatch prequantize` as a Ray job: fills the cache of quantized weights ahead of a job.

    ray job submit --working-dir . -- python jobs/prequantize.py job.yaml --set model.cache=s3://...

Takes what `quantbatch prequantize` takes. The model is quantized in one process where a replica of
the job would run, on a card of the cluster. The last line that it prints is one JSON document.
"""

from quantbatch.cli import main

if __name__ == "__main__":
    import sys

    main(["prequantize", "--cluster", "--json", *sys.argv[1:]])
