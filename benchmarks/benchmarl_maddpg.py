"""MADDPG's updates by BenchMARL's own unchanged ``Experiment``: a contender of ``maddpg_update.py``.

Collects one batch, then makes as many updates as each line of its input says and answers with the seconds.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from importlib import metadata

import torch
from benchmarl.algorithms import MaddpgConfig
from benchmarl.environments import VmasTask
from benchmarl.experiment import Experiment, ExperimentConfig
from benchmarl.models.mlp import MlpConfig


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    config = ExperimentConfig.get_from_yaml()
    config.sampling_device = config.train_device = config.buffer_device = "cpu"
    config.share_policy_params = False
    config.lr = settings["lr"]
    config.max_n_frames, config.max_n_iters = None, 1
    config.off_policy_collected_frames_per_batch = settings["frames"]
    config.off_policy_n_envs_per_worker = settings["envs"]
    config.off_policy_n_optimizer_steps = 1
    config.off_policy_train_batch_size = settings["size"]
    config.off_policy_memory_size = settings["frames"]
    config.evaluation = config.render = config.create_json = False
    config.loggers = []
    task = VmasTask.NAVIGATION.get_from_yaml()
    task.config = {"max_steps": 100, **settings["task"]}
    algorithm, model = MaddpgConfig.get_from_yaml(), MlpConfig.get_from_yaml()
    algorithm.share_param_critic = False
    model.num_cells = [settings["width"]] * 2
    with tempfile.TemporaryDirectory() as folder:
        config.save_folder = folder
        experiment = Experiment(
            task=task, algorithm_config=algorithm, model_config=model, seed=0, config=config
        )
        experiment.run()
        loss = experiment.losses["agents"]
        nets = {"actor": loss.actor_network_params, "critic": loss.value_network_params}
        about = {name: sum(p.numel() for p in params.values(True, True)) for name, params in nets.items()}
        versions = {name: metadata.version(name) for name in ("torch", "torchrl", "benchmarl")}
        answers.write(json.dumps({"parameters": about, "versions": versions}) + "\n")
        answers.flush()
        for line in sys.stdin:
            start = time.perf_counter()
            for _ in range(int(line)):
                experiment._optimizer_loop("agents")
            answers.write(json.dumps({"seconds": time.perf_counter() - start}) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
