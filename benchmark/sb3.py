"""Stable-Baselines3's PPO with the hyper-parameters of CleanRL's, as a baseline of `run.py speed`.

    python benchmark/sb3.py HalfCheetah-v5 14336

Needs stable-baselines3, gymnasium[mujoco], ale-py, opencv-python and tensorboard; writes
TensorBoard files below runs/.
"""

import sys

import ale_py
import gymnasium as gym
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize


def main(env_id: str, total_timesteps: int) -> None:
    shared = {
        "gae_lambda": 0.95,
        "gamma": 0.99,
        "max_grad_norm": 0.5,
        "vf_coef": 0.5,
        "device": "cpu",
    }
    shared |= {"tensorboard_log": "runs", "verbose": 0}
    if "NoFrameskip" in env_id:
        gym.register_envs(ale_py)
        envs = VecFrameStack(make_atari_env(env_id, n_envs=8, seed=1), n_stack=4)
        sizes = {"n_steps": 128, "batch_size": 256, "n_epochs": 4, "learning_rate": 2.5e-4}
        agent = PPO("CnnPolicy", envs, clip_range=0.1, ent_coef=0.01, **sizes, **shared)
    else:
        torch.set_num_threads(1)
        envs = VecNormalize(make_vec_env(env_id, n_envs=1, seed=1))
        sizes = {"n_steps": 2048, "batch_size": 64, "n_epochs": 10, "learning_rate": 3e-4}
        agent = PPO("MlpPolicy", envs, clip_range=0.2, ent_coef=0.0, **sizes, **shared)
    agent.learn(total_timesteps, log_interval=1)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
