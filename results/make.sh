#!/usr/bin/env bash
# Make results/ again: an hour and three quarters on two idle CPU cores. Run it from the repository root:
#
#   bash results/make.sh
#
# It needs requirements-dev.txt and the images of the emoji (weights/pocket-emoji/README.md says how to get them). A step
# that is finished is not repeated, unless its command or a student that ships has changed; delete runs/all to start
# over.
# Made separately, because they take long or rarely change:
#   python -m minidistill.evaluate sweeps                  (about 50 minutes on one core)
#   python -m minidistill.bench updates --repeats 9        bench-train.json
#   python -m minidistill.bench loading                    load.json
#   python -m minidistill.evaluate few-steps ...           few-steps/, by the commands in results/README.md
#   python -m minidistill.evaluate quality "runs/front/student.safetensors" "runs/front/student of two steps.safetensors" \
#     --pictures 8 --out runs/front                         the README's image; these are copies of the LoRAs that ship
#   python -m minidistill.pocket.judge --lora weights/pocket-emoji/{guidance,fewstep}-lora.safetensors \
#     runs/all/trajectories --limit 256 --seeds 2 --out results/pocket.json
set -euo pipefail

student=weights/pocket-emoji/guidance-lora.safetensors
checksum=$(cat weights/pocket-emoji/*-lora.safetensors | cksum)
mkdir -p runs/all

# step "NAME" ARGUMENTS...: run python with the arguments, unless the step has succeeded before.
step() {
  local name=$1 stamp="runs/all/$1.done"
  shift
  local made_with="python $* (students $checksum)"
  if [[ -f $stamp && $(< "$stamp") == "$made_with" ]]; then
    echo "$name: done, says $stamp"
    return
  fi
  printf '\n%s: python %s\n' "$name" "$*"
  python "$@"
  echo "$made_with" > "$stamp"
}

# What later steps need, checked before the training.
python -c "import diffusers, peft"
python -c "from minidistill.pocket.images import PACKAGE, THINGS, find_emoji; [find_emoji(e, PACKAGE) for e in THINGS]"

# Three students of one teacher with as many updates. The first and the third share the teacher's trajectories.
resume="--no-report --resume --save-every 25"
step "a LoRA from trajectories" train.py --out runs/all/trajectories --states runs/all/states $resume
step "a LoRA from noised latents" train.py --method noised --out runs/all/noised $resume
step "a full copy" train.py --method full --out runs/all/full --states runs/all/states $resume

# How good they are, beside the student that ships.
step "quality" -m minidistill.evaluate quality $student runs/all/trajectories runs/all/noised runs/all/full \
  weights/pocket-emoji/fewstep-lora.safetensors --selective 0.2 0.5 --interval 200 800 --judge minidistill.pocket.judge \
  --pictures 256 --work runs/all/evaluation --out results/evaluation
step "the dial" -m minidistill.evaluate dial $student --guidance 1.25 1.5 2 3 --out results/dial
step "what was learned" -m minidistill.evaluate spectrum runs/all/full runs/all/trajectories --out results/spectrum

# What they cost.
step "memory" -m minidistill.bench memory
step "memory, step by step" -m minidistill.bench memory --steps
step "memory, measured" -m minidistill.bench memory --size pocket --device cpu --measure \
  --out results/memory-pocket.json
step "memory, measured at full size" -m minidistill.bench memory --size sd15 --device cpu --dtype float32 --measure \
  --out results/memory-sd15.json
step "time, emoji model" -m minidistill.bench speed --size pocket --memory --compile --out results/bench-pocket.json
step "time, Stable Diffusion 1.5" -m minidistill.bench speed --size sd15 --memory --out results/bench-sd15.json

python -m minidistill.evaluate summary
