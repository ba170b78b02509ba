"""Files of requests as hosted APIs take them in batches, and the files that they give back.

bodies     what a request's body asks for, or which of its options can't be honoured
messages   the conversation and the tools of a body
prompts    rows of such a file to token ids, each with what it asks for
replies    answers to response bodies
lines      response bodies to lines of the output file and the error file
"""
