"""One process of a run of several, for test_hosts.py: trains configs of tiny_runs.py one after the other.

    python one_of_several.py COORDINATOR NUM_PROCESSES PROCESS_ID SETTINGS

SETTINGS is JSON: "trainings", a list of [config, workdir, changes]; "other", what process 1 trains instead of the first;
"lost_s", see `hosts.LOST_S`.
"""

import json
import sys

import tiny_runs as runs
from absl import logging

from iresnet_jax.runs import hosts, signals
from iresnet_jax.runs.command_line import explain_failures
from iresnet_jax.runs.loop import train


def main():
    coordinator, num_processes, process_id, settings = sys.argv[1:]
    settings = json.loads(settings)
    hosts.LOST_S = settings.get("lost_s", hosts.LOST_S)
    hosts.initialize(coordinator, int(num_processes), int(process_id))
    logging.set_verbosity(logging.WARNING)
    if "other" in settings and process_id == "1":
        settings["trainings"][0] = settings["other"]
    with hosts.ending_together():
        for name, workdir, changes in settings["trainings"]:
            train(runs.config_of(runs.CONFIGS[name], **changes), workdir)
    return 0


if __name__ == "__main__":
    signals.end_at_signals("the same command goes on")
    sys.exit(explain_failures(main))
