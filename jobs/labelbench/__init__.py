"""What reading costs against writing: labels, scores and vectors, on the model of `enginebench`.

contenders.py    ours, and what a user of transformers would write instead
race.py          all of them in turn over the same rows, in one process
"""
