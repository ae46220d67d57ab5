#!/usr/bin/env bash
# Recurrent-KIF as a shell script: one command per phase, so that you can stop, look or swap a step.
#
#   examples/recurrent_kif.sh MODEL RECIPE OUT TASK.jsonl TASK.jsonl...
#
# MODEL is a folder or a Hub name; RECIPE gives the options, as `kifmerge run` takes them (its own
# model and tasks are not looked at). The script leaves OUT/final -> the last checkpoint, and the
# weights are those of `kifmerge run` with seed 0, bit for bit on a CPU. Kill it at any time and run
# it again: what is made already is not made again.
#
# A classifier needs a head for the labels of all tasks from the start, in the order of the tasks:
# LABELS=$'first label\nsecond label' examples/recurrent_kif.sh ...
set -euo pipefail

model=$1 recipe=$2 out=$3
shift 3
tasks=("$@")
fraction=${MEMORY_FRACTION:-0.02}
inner_steps=${INNER_STEPS:-8}

labels=()
while IFS= read -r label; do
  [ -z "$label" ] || labels+=(--label "$label")
done <<<"${LABELS:-}"

phase() { kifmerge "$@" --quiet --json; }
steps_left() { python3 -c 'import json, sys; r = json.load(sys.stdin); print(r["total_steps"] - r["step"])'; }

# The first task has no memory: plain training.
current=$out/task-1
phase train --model "$model" --recipe "$recipe" --data "${tasks[0]}" --seed 1 --initial-seed 0 \
  ${labels[@]+"${labels[@]}"} --out "$current" >/dev/null

for ((number = 2; number <= ${#tasks[@]}; number++)); do
  data=${tasks[number - 1]}
  memory=$out/memory-$((number - 1)).jsonl
  earlier=()
  for task in "${tasks[@]:0:number-1}"; do earlier+=(--data "$task"); done
  phase memory "${earlier[@]}" --fraction "$fraction" --seed 1 --out "$memory" >/dev/null

  state=() left=1
  for ((round = 1; left > 0; round++)); do
    folder=$out/task-$number/round-$round
    left=$(phase train --model "$current" --recipe "$recipe" --data "$data" --seed "$number" \
      --steps "$inner_steps" ${state[@]+"${state[@]}"} --out "$folder/inner" | steps_left)
    phase replay --model "$folder/inner" --recipe "$recipe" --memory "$memory" \
      --state "$folder/inner/state" --out "$folder/outer" >/dev/null
    phase merge --rule recurrent-kif --base "$current" \
      --new "$folder/inner" --historical "$folder/outer" \
      --new-importance "$folder/inner/importance" \
      --historical-importance "$folder/outer/importance" --out "$folder/fused" >/dev/null
    current=$folder/fused
    state=(--state "$folder/outer/state")
    echo "task $number round $round: fused, $left steps left" >&2
  done
done
ln -sfn "$(realpath "$current")" "$out/final"
