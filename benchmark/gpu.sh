#!/usr/bin/env bash
# Checks and measures what needs a GPU, in one call of about ten minutes: bash benchmark/gpu.sh
# Prints a table: steps per second of Pong, eager and with CUDA graphs, and the first losses of both,
# which should be alike; then plays Pong to 19.5 with README's recipe.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

nvidia-smi --query-gpu=name,driver_version --format=csv
python -m pytest -m gpu --numprocesses=0

for envs in 8 64 128; do
    for how in compile no-compile; do
        python ppo_atari.py --device cuda --num-envs $envs --$how --run-name gpu-$envs-$how \
            --total-timesteps $((25 * 128 * envs))
    done
done
python - << 'END'
from pathlib import Path
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

print("| run | steps/s | policy loss of the first three iterations |")
for folder in sorted(Path("runs").glob("gpu-*compile")):
    log = EventAccumulator(str(folder)).Reload()
    losses = [f"{point.value:.5f}" for point in log.Scalars("losses/policy_loss")[:3]]
    print(f"| {folder.name} | {log.Scalars('charts/SPS')[-1].value:.0f} | {', '.join(losses)} |")
END
time python ppo_atari.py --env-id PongNoFrameskip-v4 --device cuda --total-timesteps 1100000 \
    --background 87 --num-envs 16 --num-minibatches 8 --update-epochs 8 --target-kl 0.015 \
    --learning-rate 1e-3 --gamma 0.98 --gae-lambda 0.9 --ent-coef 0.001 --no-norm-adv \
    --no-clip-vloss --target-return 19.5 --run-name gpu-pong
