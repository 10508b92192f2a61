"""The killable side of a verifier: a script that answers JSON lines; it imports nothing of kd.

Run by path, with Python's isolated mode: ``python -I worker.py TASK``. It imports what the task
needs and says ``ready``; then one request a line on stdin, one answer a line on a copy of stdout.
What the libraries print goes to stderr.
"""

import importlib
import json
import os
import resource
import sys

MEMORY = 4 * 2**30


def gym(request):
    """reasoning-gym's own scorer for one of its items; anything below 1 is wrong.

    An answer may come in several forms (its last statement, the whole text): the best one counts.
    """
    import reasoning_gym

    name = request["dataset"]
    if name not in _GYM:
        _GYM[name] = reasoning_gym.create_dataset(name, size=1, seed=0)
    scorer = _GYM[name].score_answer
    score = max(float(scorer(answer, request["entry"])) for answer in request["answers"])
    status = "correct" if score >= 1.0 else "wrong"
    return [status, "" if status == "correct" else "scored below 1", f"score {score:g}"]


_GYM: dict = {}
TASKS = {"gym": gym}
LIBRARIES = {"gym": "reasoning_gym"}


def main():
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if sys.argv[1:] and sys.argv[1] in LIBRARIES:
        importlib.import_module(LIBRARIES[sys.argv[1]])
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = TASKS[request["task"]](request)
        except BaseException as error:  # also what hostile input makes the libraries raise
            answer = ["error", "verifier crashed", f"{type(error).__name__}: {error}"[:300]]
        answers.write(json.dumps([request["nonce"], *answer]) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
