#!/usr/bin/env bash
# Run tests/cuda and benchmarks/gpu.py on a machine with a GPU and torch, but without a network: `make gpu`.
# First make the pack elsewhere (`make gpu-pack`), and copy the repository with the folder build/gpu.
#
#   OUT=output/gpu            the folder for tests.txt, gpu.txt, gpu.json and gpu.md
#   TORCH_PYTHON=python3      the Python that has torch, torchvision and NumPy
#   SECONDS_IN_ALL=530        the time of both; the tests take at most a third of it
#   BENCHMARK_OPTIONS=        more options of benchmarks/gpu.py, for example "--device cpu --tiny"
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
out=${OUT:-output/gpu} python=${TORCH_PYTHON:-python3} limit=${SECONDS_IN_ALL:-530}
read -r -a options <<<"${BENCHMARK_OPTIONS:-}"

if [ ! -f build/gpu/site.tar.gz ]; then
    echo "There is no pack in build/gpu. Run \`make gpu-pack\` on a machine that reaches a package index, and copy it here." >&2
    exit 2
fi
mkdir -p "$out"
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"$python" -W ignore -m tarfile -e build/gpu/site.tar.gz "$site" || exit 2
export PYTHONPATH="$PWD/projects/GDetKD:$site" PYTHONWARNINGS=ignore PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export DETECTRON2_DATASETS="$PWD/build/gpu/datasets"

# Four processes share the GPU. Each needs only one thread. After an interrupt, pytest still prints the failures.
OMP_NUM_THREADS=1 timeout -s INT -k 10 $((limit / 3)) "$python" -m pytest -v -p no:cacheprovider -n 4 tests/cuda 2>&1 |
    tee "$out/tests.txt"
tests=${PIPESTATUS[0]}

# The benchmark gets 8 minutes, or what is left. Its imports and its last item may take some seconds more.
left=$((limit - SECONDS - 25))
minutes=$("$python" -c "print(round(min(8, max(0, $left) / 60), 2))")
timeout $((limit - SECONDS)) "$python" benchmarks/gpu.py --minutes "$minutes" --output "$out" "${options[@]}" 2>&1 |
    tee "$out/gpu.txt"
benchmark=${PIPESTATUS[0]}

echo "tests/cuda: exit code $tests; benchmarks/gpu.py: exit code $benchmark; $SECONDS seconds; results in $out"
[ "$tests" -eq 0 ] && [ "$benchmark" -eq 0 ]
