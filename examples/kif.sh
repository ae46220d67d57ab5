#!/usr/bin/env bash
# KIF as a shell script: train, group, merge, task after task, without any replay.
#
#   examples/kif.sh MODEL RECIPE OUT TASK.jsonl TASK.jsonl...
#
# MODEL is a folder or a Hub name; RECIPE gives the options, as `kifmerge run` takes them (its own
# model and tasks are not looked at). The script leaves OUT/final -> the last checkpoint, and the
# weights are those of `kifmerge run` with method kif and seed 0, bit for bit on a CPU. Kill it at
# any time and run it again: what is made already is not made again.
#
# UNIT=lora-rank or layer takes other skill units than whole tensors, RULE=kif-adaptive the adaptive
# fusion. A classifier needs a head for the labels of all tasks from the start, in the order of the
# tasks: LABELS=$'first label\nsecond label' examples/kif.sh ...
set -euo pipefail

model=$1 recipe=$2 out=$3
shift 3
unit=${UNIT:-tensor}
rule=${RULE:-kif}

labels=()
while IFS= read -r label; do
  [ -z "$label" ] || labels+=(--label "$label")
done <<<"${LABELS:-}"

phase() { kifmerge "$@" --quiet --json >/dev/null; }

current=$model
number=0
for task in "$@"; do
  number=$((number + 1))
  folder=$out/task-$number
  before=$out/task-$((number - 1))
  historical=()
  [ "$number" = 1 ] || historical=(--historical-units "$before/units")

  # The whole task from the fused weights, scored on the way; the very first step is left out.
  phase train --kif --model "$current" --recipe "$recipe" --set "kif.unit=$unit" --data "$task" \
    --seed "$number" --initial-seed 0 ${labels[@]+"${labels[@]}"} --out "$folder/new"
  # One score for each skill unit, and what it means to all tasks so far.
  phase group --importance "$folder/new/importance" --unit "$unit" \
    ${historical[@]+"${historical[@]}"} --out "$folder/units"
  if [ "$number" = 1 ]; then
    current=$folder/new
  else
    # Unit by unit: the new weights, those before the task, or both.
    phase merge --rule "$rule" --new "$folder/new" --historical "$current" \
      --new-units "$folder/units" --historical-units "$before/units" --out "$folder/fused"
    current=$folder/fused
  fi
  echo "task $number: learnt" >&2
done
ln -sfn "$(realpath "$current")" "$out/final"
