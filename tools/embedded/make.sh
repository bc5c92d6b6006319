#!/usr/bin/env bash
# Makes marble_jax/embedded from nothing: fixed seeds, no downloads. Needs pip install -e ".[dev,torch]".
# About 40 minutes on two otherwise idle CPU cores: autoencoder 15 min, base 10 min, alignment 5, preference 6, judge 2.
set -euo pipefail
cd "$(dirname "$0")"
build=${1:?usage: make.sh BUILD_DIRECTORY}
out=../../marble_jax/embedded
python autoencoder.py --out "$build/vae" --steps 1800
python base.py --vae "$build/vae" --out "$build/pipeline" --steps 3000
python rewards.py align --base "$build/pipeline" --out "$build/rewards" --steps 900
python rewards.py prefer --base "$build/pipeline" --out "$build/rewards"
python rewards.py judge --base "$build/pipeline" --out "$build/rewards" --steps 450
python prompts.py --out "$out/prompts"
python assemble.py --base "$build/pipeline" --rewards "$build/rewards" --out "$out"
marble-jax reward check --path="$out/rewards" --size=64 --write
