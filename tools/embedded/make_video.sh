#!/usr/bin/env bash
# Makes marble_jax/embedded/video from nothing: no downloads. Needs pip install -e ".[dev,torch]". Training goes by the
# clock, on two CPU cores: autoencoder 28 min in two rounds, the second on clips alone, base model 24 min with its data.
set -euo pipefail
cd "$(dirname "$0")"
build=${1:?usage: make_video.sh BUILD_DIRECTORY}
out=../../marble_jax/embedded/video
python video_autoencoder.py --out "$build/vae_first" --seconds 1080
python video_autoencoder.py --first "$build/vae_first" --out "$build/vae" --seconds 600 --learning_rate 2e-3
python video_base.py --vae "$build/vae" --out "$build/pipeline" --seconds 1300
python video_prompts.py --out "$out/prompts"
python video_assemble.py --base "$build/pipeline" --out "$out"
marble-jax reward check --path=embedded_video --write
