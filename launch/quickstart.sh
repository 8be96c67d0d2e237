#!/usr/bin/env bash
# Teaches a tiny language model to see, from nothing to a PyTorch folder, in under 20 minutes on 2 CPU cores.
#
#   bash launch/quickstart.sh        everything goes to runs/quickstart; run it again to continue where it stopped
#
# Every line below is a command a user would type; `vora <verb> --help` explains each.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
run=runs/quickstart
configs=configs/quickstart
mkdir -p "$run"
date +%s >"$run/started"

step() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }
finished() { [[ -e "$1/config.json" ]] || compgen -G "$1/steps/*/SHA256.json" >/dev/null; }
unless() { finished "$1" || "${@:2}"; }  # a finished folder is kept

step 'install'
make_environment "$run/venv" torch
vora=$run/venv/bin/vora

step 'data: easy-vqa, pictures of one coloured shape with questions'
"$vora" prepare easy-vqa --to "$run/data"

step 'stage 1: a tiny language model, from text alone'
"$vora" train $configs/lm.gin --workdir "$run/lm"

step 'stage 2: the distillation teacher, a small ViT'
"$vora" train $configs/teacher.gin --workdir "$run/teacher"

step 'stage 3: VoRA. The language model is frozen; LoRA, patch embedding and heads learn to see'
"$vora" train $configs/vora.gin --workdir "$run/vora"
"$vora" eval "$run/vora" $configs/eval.gin --json "$run/vora/eval.json" --predictions "$run/vora/predictions.jsonl"

step 'merge: the adapters disappear into the kernels'
unless "$run/merged" "$vora" merge "$run/vora" --to "$run/merged"

step 'stage 4: fine-tune the merged model'
"$vora" train $configs/finetune.gin --workdir "$run/finetune"
"$vora" eval "$run/finetune" $configs/eval.gin --json "$run/finetune/eval.json" \
    --predictions "$run/finetune/predictions.jsonl" --grid "$run/grid.png"

step 'hand-over: PyTorch folders, and proof that they compute the same'
for stage in vora finetune; do
    unless "$run/$stage-hf" "$vora" export "$run/$stage" --to "$run/$stage-hf"
    "$vora" verify "$run/$stage" "$run/$stage-hf" --data "$run/data/test.jsonl" --json "$run/$stage/verify.json"
done

step 'ask it something'
"$vora" generate "$run/finetune" --image "$run/data/images/test/0.png" 'what color is the shape?'

step 'results'
"$run/venv/bin/python" launch/quickstart_results.py "$run"
