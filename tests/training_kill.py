"""A training run that kills itself: training_kill.py FOLDER STEP, or FOLDER mark NAME.

Dies by SIGKILL at the end of a step, or instead of marking the checkpoint NAME complete. A process
of its own: a child forked from one that has used torch's threads would wait for them for ever.
"""

import os
import signal
import sys

from training_cases import At, faulty_trainer

from kd.training import trainer


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def main(folder, when, name=""):
    if when == "mark":
        real = trainer.mark_complete
        trainer.mark_complete = lambda path: die() if path.name == name else real(path)
        faulty_trainer(folder).train()
    else:
        faulty_trainer(folder, At(int(when), die)).train()


if __name__ == "__main__":
    main(*sys.argv[1:])
