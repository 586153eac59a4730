#!/usr/bin/env bash
# Train the paper's network on two devices, one column on each (section 3.2):
#
#     launch/two_devices.sh --workdir=runs/paper --config.data.dir=DATA
#
# This uses two GPUs. With fewer GPUs, or with CPU=1 in the environment, it rehearses on two
# virtual devices of the CPU, with the same program, exchanges and numbers.
# The arguments are those of alexnet_jax.main. --config defaults to configs/paper.py. One
# process drives both devices. launch/multiprocess.py starts one process per device instead.
set -euo pipefail

root=$(cd "$(dirname "$(readlink -f "$0")")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
if ! command -v "$python" >/dev/null; then
    echo "error: no $python; run make quickstart or make test once, or set PYTHON." >&2
    exit 1
fi

gpus=0
if [ -z "${CPU:-}" ] && command -v nvidia-smi >/dev/null; then
    gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)
fi
devices=()
if [ "$gpus" -lt 2 ]; then
    echo "two virtual devices of the CPU (GPUs here: $gpus)"
    devices=(--cpu_devices=2)
elif [ -z "${CUDA_VISIBLE_DEVICES:-}" ]; then
    export CUDA_VISIBLE_DEVICES=0,1
fi

# --config must come before the flags that change its fields.
config=--config=$root/configs/paper.py
others=()
while [ $# -gt 0 ]; do
    case $1 in
    --config) config=--config=${2:-} && shift ;;
    --config=*) config=$1 ;;
    *) others+=("$1") ;;
    esac
    shift
done
# configs/NAME.py, also with :ARGUMENT, is the repository's, from whatever folder you call this.
file=${config#--config=}
if [ ! -e "${file%%:*}" ] && [ -e "$root/${file%%:*}" ]; then
    config=--config=$root/$file
fi
# So Python finds the package and configs/ from any folder.
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m alexnet_jax.main "$config" \
    --config.parallel.mode=columns --config.parallel.data=1 --config.parallel.column=2 \
    "${devices[@]}" "${others[@]}"
