"""One process of a run of several, for test_distributed.py: trains configs of runs.py one after the other.

    python one_of_several.py COORDINATOR NUM_PROCESSES PROCESS_ID SETTINGS

SETTINGS is JSON: "trainings", a list of [config, workdir, changes]; "other", what process 1 trains instead of the first;
"lost_s", see `distributed.LOST_S`.
"""

import json
import sys

import runs
from absl import logging

from iresnet_jax.runs import distributed, interruption
from iresnet_jax.runs.command_line import explain_failures
from iresnet_jax.runs.loop import train


def main():
    coordinator, num_processes, process_id, settings = sys.argv[1:]
    settings = json.loads(settings)
    distributed.LOST_S = settings.get("lost_s", distributed.LOST_S)
    distributed.initialize(coordinator, int(num_processes), int(process_id))
    logging.set_verbosity(logging.WARNING)
    if "other" in settings and process_id == "1":
        settings["trainings"][0] = settings["other"]
    with distributed.ending_together():
        for name, workdir, changes in settings["trainings"]:
            train(runs.config_of(runs.CONFIGS[name], **changes), workdir)
    return 0


if __name__ == "__main__":
    interruption.end_at_signals("the same command goes on")
    sys.exit(explain_failures(main))
