"""A process that uses the library against the test Hub: Python on standard input, one answer a line on standard output.

huggingface_hub reads its environment when it is imported, and importing takes seconds: one such process serves many
tests. A request is {"code", "token"}; the code leaves its result, JSON, in `answer`.
"""

import json
import os
import sys
import time
import warnings

import torch

import snlp_zoo
from snlp_zoo.errors import SnlpError

answers, sys.stdout = sys.stdout, sys.stderr  # whatever else is printed is no answer
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.02))  # who waits before trying again waits less in tests
warnings.simplefilter("ignore")
answers.write("ready\n")
answers.flush()
for line in sys.stdin:
    request = json.loads(line)
    os.environ["HF_TOKEN"] = request["token"]
    names = {"snlp_zoo": snlp_zoo, "torch": torch, "sleep": sleep, "answer": None}
    try:
        exec(request["code"], names)  # noqa: S102  (the tests' own)
        reply = {"answer": names["answer"]}
    except SnlpError as error:
        reply = {"error": type(error).__name__, "message": str(error)}
    except Exception as error:
        reply = {"error": f"unexpected {type(error).__name__}", "message": str(error)}
    answers.write(json.dumps(reply) + "\n")
    answers.flush()
