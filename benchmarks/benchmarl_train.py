"""MAPPO, QMIX or MADDPG by BenchMARL's own unchanged ``Experiment``, stopped between iterations by a callback.

A contender of ``train.py``, which starts it in a virtual environment of its own: BenchMARL 1.5.2 needs an
older TorchRL than tdmarl.
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

from benchmarl.algorithms import MaddpgConfig, MappoConfig, QmixConfig
from benchmarl.environments import VmasTask
from benchmarl.experiment import Callback, Experiment, ExperimentConfig
from benchmarl.models.mlp import MlpConfig
from tensordict import TensorDictBase
from train_worker import EMBED, Settings, Worker


NETWORKS = {"mappo": ("actor", "critic"), "qmix": ("local_value", "mixer"), "maddpg": ("actor", "value")}


class Turns(Callback):
    """Hands the time of each phase to the driver and waits for the next turn; the training stays as it is."""

    def __init__(self, worker: Worker) -> None:
        super().__init__()
        self.worker = worker
        self.started = self.collected = worker.clock()

    def __getstate__(self) -> dict[str, object]:
        return {}  # BenchMARL pickles its callbacks when it starts, and a pipe cannot be

    def begin(self) -> None:
        """Wait for the driver's word, then note the time; leave the experiment when there is no next turn."""
        if not self.worker.wait():
            sys.exit(0)
        self.started = self.worker.clock()

    def on_batch_collected(self, batch: TensorDictBase) -> None:
        self.collected = self.worker.clock()
        self.batch = batch

    def on_train_end(self, training_td: TensorDictBase, group: str) -> None:
        # Copying the weights to the collector comes after this call and counts to the next iteration.
        self.worker.report(self.started, self.collected, self.worker.clock(), self.batch)
        self.begin()


def experiment_config(settings: Settings, folder: str) -> ExperimentConfig:
    """BenchMARL's defaults with the numbers of this comparison, no logging, no evaluation of its own."""
    config = ExperimentConfig.get_from_yaml()
    config.sampling_device = config.train_device = config.buffer_device = settings.device
    config.gamma = settings.gamma
    config.lr = settings.lr
    config.adam_eps = settings.adam_eps
    config.clip_grad_norm = True
    config.clip_grad_val = settings.max_grad_norm
    config.max_n_frames = None
    config.max_n_iters = 1_000_000  # the driver ends the run
    config.on_policy_collected_frames_per_batch = settings.frames
    config.on_policy_n_envs_per_worker = settings.num_envs
    config.on_policy_n_minibatch_iters = settings.epochs
    config.on_policy_minibatch_size = settings.minibatch_size
    config.off_policy_collected_frames_per_batch = settings.frames
    config.off_policy_n_envs_per_worker = settings.num_envs
    config.off_policy_n_optimizer_steps = settings.updates
    config.off_policy_train_batch_size = settings.minibatch_size
    config.off_policy_memory_size = settings.buffer_size
    config.polyak_tau = settings.tau
    config.exploration_eps_init = settings.explore_start
    config.exploration_eps_end = settings.explore_end
    config.exploration_anneal_frames = settings.explore_frames
    config.prefer_continuous_actions = settings.continuous
    config.share_policy_params = settings.algorithm != "maddpg"
    config.evaluation = False
    config.render = False
    config.loggers = []
    config.create_json = False
    config.save_folder = folder
    return config


def algorithm_config(settings: Settings) -> Any:
    """BenchMARL's algorithm with the choices of this comparison."""
    if settings.algorithm == "qmix":
        algorithm = QmixConfig.get_from_yaml()
        algorithm.mixing_embed_dim = EMBED
        return algorithm
    if settings.algorithm == "maddpg":
        algorithm = MaddpgConfig.get_from_yaml()
        algorithm.share_param_critic = False
        return algorithm
    algorithm = MappoConfig.get_from_yaml()
    algorithm.share_param_critic = True
    algorithm.clip_epsilon = settings.clip_epsilon
    algorithm.entropy_coef = settings.entropy_coeff
    algorithm.critic_coef = 1.0
    algorithm.loss_critic_type = "l2"
    algorithm.lmbda = settings.lmbda
    algorithm.scale_mapping = "biased_softplus_1.0"
    algorithm.use_tanh_normal = True
    algorithm.minibatch_advantage = False
    return algorithm


def main() -> None:
    worker = Worker()
    settings = worker.settings

    task = VmasTask[settings.scenario.upper()].get_from_yaml()
    task.config = {"max_steps": settings.max_steps, **settings.scenario_args}
    model = MlpConfig.get_from_yaml()
    model.num_cells = settings.hidden

    turns = Turns(worker)
    with tempfile.TemporaryDirectory() as folder:
        experiment = Experiment(
            task=task,
            algorithm_config=algorithm_config(settings),
            model_config=model,
            seed=settings.seed,
            config=experiment_config(settings, folder),
            callbacks=[turns],
        )
        loss = experiment.losses["agents"]
        networks = {
            name: getattr(loss, f"{name}_network_params").values(True, True)
            for name in NETWORKS[settings.algorithm]
        }
        worker.start(experiment.policy, networks)
        turns.begin()
        experiment.run()


if __name__ == "__main__":
    main()
