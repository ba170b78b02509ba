"""The entry point of a Ray job.

    ray job submit --working-dir=. --runtime-env=jobs/runtime_env.yaml python jobs/run.py job.yaml

Takes what `quantbatch run` takes. The last line that it prints is one JSON document with the
outcome, because `ray job submit` keeps no more of an exit code than whether it was 0.
"""

from quantbatch.cli import main

if __name__ == "__main__":
    import sys

    main(["run", "--json", *sys.argv[1:]])
