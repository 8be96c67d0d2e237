#!/usr/bin/env bash
# Every method on easy-VQA, from the same language model, encoder and data; minutes each on 2 CPU cores.
#
#   bash launch/demo.sh METHOD       one of the methods below: train, evaluate, export, verify
#   bash launch/demo.sh all          all of them, then the table
#   bash launch/demo.sh base         only what they share: data, language model, encoder (about 8 minutes, made once)
#
# Everything goes to runs/demo; run it again to continue where it stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
run=runs/demo
configs=configs/demo

methods=(llava vora lavin llavit vce_dual_lora kernels_on_patches dual_lora_on_llava)
stages_of() {
    case $1 in
        vora | lavin) echo "$1" ;;
        llava | llavit | vce_dual_lora | kernels_on_patches | dual_lora_on_llava) echo "$1_pretrain $1_finetune" ;;
        *) echo "demo.sh: no method '$1'; choose one of ${methods[*]}, base or all." >&2; return 2 ;;
    esac
}

step() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }

base() {
    step 'install'
    make_environment "$run/venv" torch
    vora=$run/venv/bin/vora
    step 'shared: data, language model, encoder'
    [[ -e $run/data/manifest.json ]] || "$vora" prepare easy-vqa --to "$run/data"
    "$vora" train $configs/lm.gin --workdir "$run/lm"
    "$vora" train $configs/encoder.gin --workdir "$run/encoder"
}

demo() {
    local stage stages started=$SECONDS fresh=1
    stages=$(stages_of "$1")
    for stage in $stages; do [[ ! -e $run/$stage ]] || fresh=0; done
    for stage in $stages; do
        step "$1: train $stage"
        "$vora" train "$configs/$stage.gin" --workdir "$run/$stage"
    done
    step "$1: evaluate, export, verify"
    "$vora" eval "$run/$stage" $configs/eval.gin --json "$run/$stage/eval.json"
    "$vora" export "$run/$stage" --to "$run/$1-hf" --overwrite
    "$vora" verify "$run/$stage" "$run/$1-hf" --data "$run/data/test.jsonl" --json "$run/$stage/verify.json"
    # A run that was continued does not tell how long the whole takes.
    [[ $fresh == 0 ]] || echo "$((SECONDS - started))" >"$run/$stage/seconds"
}

case ${1:-} in
    all) chosen=("${methods[@]}") ;;
    base) chosen=() ;;
    '') sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2 ;;
    *) stages_of "$1" >/dev/null; chosen=("$1") ;;
esac
mkdir -p "$run"
base
for method in "${chosen[@]}"; do demo "$method"; done
[[ ${#chosen[@]} -eq 0 ]] || "$run/venv/bin/python" launch/demo_results.py "$run"
