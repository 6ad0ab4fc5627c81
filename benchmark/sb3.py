"""PPO of Stable-Baselines3 or SBX (JAX) with CleanRL's hyper-parameters, for `run.py speed`.

    python benchmark/sb3.py sb3 HalfCheetah-v4 14336 8

Arguments: sb3 or sbx, the environment, its steps, and how many environments make the batch: of 2048
steps on MuJoCo, of 1024 in Atari. Needs stable-baselines3 or sbx-rl, gymnasium[mujoco], ale-py,
opencv-python and tensorboard; writes TensorBoard files below runs/.
"""

import sys

import ale_py
import gymnasium as gym
import torch
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize


def main(library: str, env_id: str, total_timesteps: int, num_envs: int) -> None:
    if library == "sbx":
        from sbx import PPO
    else:
        from stable_baselines3 import PPO
    shared = {"gae_lambda": 0.95, "gamma": 0.99, "max_grad_norm": 0.5, "vf_coef": 0.5}
    shared |= {"tensorboard_log": "runs", "verbose": 0, "device": "cpu"}
    if "NoFrameskip" in env_id:
        gym.register_envs(ale_py)
        envs = VecFrameStack(make_atari_env(env_id, n_envs=num_envs, seed=1), n_stack=4)
        sizes = {"n_steps": 1024 // num_envs, "batch_size": 256, "n_epochs": 4}
        sizes |= {"learning_rate": 2.5e-4, "clip_range": 0.1, "ent_coef": 0.01}
        agent = PPO("CnnPolicy", envs, **sizes, **shared)
    else:
        torch.set_num_threads(1)
        envs = VecNormalize(make_vec_env(env_id, n_envs=num_envs, seed=1))
        sizes = {"n_steps": 2048 // num_envs, "batch_size": 64, "n_epochs": 10}
        sizes |= {"learning_rate": 3e-4, "clip_range": 0.2, "ent_coef": 0.0}
        agent = PPO("MlpPolicy", envs, **sizes, **shared)
    agent.learn(total_timesteps, log_interval=1)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
