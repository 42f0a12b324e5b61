#!/usr/bin/env bash
# Everything that needs a GPU, in one go and without a network: correctness first, then speed, figures as JSON.
#
#   benchmarks/gpu.sh [WHEELS]
#
# WHEELS is a folder of wheels (torchrl, tensordict, vmas and what they need; torch itself is taken as it is
# installed). Without it the packages of $PYTHON are used as they are.
#
# Environment: PYTHON (python3), DEVICE (cuda; cpu tries the script out), OUT (benchmarks/results),
# QUICK=1 (tiny sizes), BUDGET (seconds in all, 540: what is left of it bounds each measurement),
# MODE (compile on a CPU, cudagraph on CUDA: the fast one), PARTS ("check simulate roofline time scale train": all of it
# takes several calls on a slow machine, one or more parts each), RESUME=1 (go on with the simulator's results that are there).
set -uo pipefail

wheels=${1:+$(realpath "$1")}
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
out=${OUT:-benchmarks/results}
budget=${BUDGET:-540}
parts=" ${PARTS:-check simulate roofline time scale train} "
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
failed=()

wanted() { [[ $parts == *" $1 "* ]]; }
left() { echo $((budget - SECONDS)); }

# Runs one part under what is left of the budget; a part that fails does not stop the others.
part() {
    local name=$1
    shift
    if [ "$(left)" -lt 20 ]; then
        echo "== $name: left out, no time"
        failed+=("$name (no time)")
        return
    fi
    echo "== $name"
    if timeout "$(left)" "$@"; then
        echo "== $name: done after $SECONDS s"
    else
        failed+=("$name (exit code $?)")
        echo "== $name: FAILED after $SECONDS s"
    fi
}

if [ -n "$wheels" ]; then
    # --without-pip, because ensurepip may be missing; the .pth shows the new environment what is installed.
    "$python" -m venv --without-pip "$work/venv" || exit 1
    site=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$python" -c 'import sys; print("\n".join(p for p in sys.path if p.endswith(("site-packages", "dist-packages"))))' \
        >"$site/inherited.pth"
    python="$work/venv/bin/python"
    "$python" -m pip install --quiet --no-index --find-links "$wheels" --no-cache-dir \
        torchrl==0.14.1 tensordict==0.14.3 vmas==1.5.2 pytest tyro tqdm || exit 1
fi
"$python" - "$device" <<'PYTHON' || exit 1
import sys
import torch, torchrl, tensordict, vmas
print(f"python {sys.version.split()[0]}, torch {torch.__version__}, torchrl {torchrl.__version__}, "
      f"tensordict {tensordict.__version__}")
if sys.argv[1].startswith("cuda"):
    print(torch.cuda.get_device_name())
PYTHON

if [ -n "${QUICK:-}" ]; then
    sizes=(--num-envs 32 --max-steps 20 --minibatch-size 320 --iterations 2 --warmup 1 --episodes 16)
    scenarios=(navigation)
    products=(--num-envs 16 --steps 10 --width 32 --simulated-envs 32 64 --scenarios simple_spread --rounds 1)
    shares=(--num-envs 32 --steps 10 --width 16 --minibatch-size 160 --rounds 1)
    growth=(--algorithms mappo --num-envs 16 32 --n-agents 2 3 --width 8 16 --at 16 2 8 --steps 10 --rounds 1)
    offpolicy=(--num-envs 16 --max-steps 20 --minibatch-size 64 --updates 4 --iterations 2 --episodes 16)
    sequential=(--num-envs 32 --steps 20 --minibatch-size 320 --rounds 1)
    iterations=(--sizes 16x16 --rounds 1 --warmup 1)
    simulator=(--scenarios dropout --num-envs 32 64 --modes eager trace --steps 4 --warmup 4 --repetitions 2
        --seconds 0.05)
else
    sizes=(--num-envs 4096 --max-steps 100 --minibatch-size 65536 --iterations 5 --warmup 2 --episodes 1024)
    scenarios=(navigation balance)
    products=()
    shares=(--num-envs 4096 --minibatch-size 65536 --width 256)
    growth=(--num-envs 1024 4096 16384 65536 --n-agents 2 4 8 16 --at 1024 4 256 --minibatch-size 65536 --rounds 3)
    offpolicy=(--num-envs 600 --minibatch-size 4096 --iterations 5 --warmup 2 --episodes 1024)
    sequential=(--num-envs 4096 --minibatch-size 65536 --rounds 3)
    iterations=(--sizes 4096x32 16384x32 65536x32 --rounds 5)
    modes=(eager compile)
    [ "${device%%:*}" = cuda ] && modes+=(cudagraph)
    simulator=(--scenarios balance simple_spread navigation --num-envs 4096 16384 65536 --modes "${modes[@]}"
        --repetitions 3 --timeout 420)
fi
mode=${MODE:-compile}
[ -z "${MODE:-}" ] && [ "${device%%:*}" = cuda ] && mode=cudagraph
[ -n "${QUICK:-}" ] && mode=${MODE:-eager}
simulated="$out/simulate-$device.json"
[ -n "${RESUME:-}" ] && simulator+=(--resume-from "$simulated")
common=(benchmarks/train.py --scenario "${scenarios[@]}" "${sizes[@]}" --device "$device" --eval-every 100
    --output "$out/train-$device.json")
benchmarl=()
[ -n "$wheels" ] && benchmarl=(--benchmarl-venv "$work/benchmarl" --wheels "$wheels")

if wanted check; then
    part "correctness: the device against the CPU" \
        "$python" benchmarks/gpu_check.py --device "$device" --output "$out/check-$device.json"
    # pytest's exit code 5, no test found, is a failure here: it would mean that nothing was checked. What needs
    # other packages (PettingZoo's environments run on the host) is left out.
    part "correctness: tests that name the device" \
        "$python" -m pytest --no-header -p no:cacheprovider -k "cuda or gpu or device" tests \
        --ignore tests/envs/test_pettingzoo.py --ignore tests/envs/test_foraging.py \
        --ignore tests/envs/test_mamujoco.py
fi
if wanted simulate; then
    part "speed: the simulator alone" \
        "$python" benchmarks/simulate.py --device "$device" "${simulator[@]}" --out "$simulated"
fi
if wanted roofline; then
    part "limits: updates beside their products, the simulator beside a copy" \
        "$python" benchmarks/roofline.py --device "$device" --mode "$mode" --simulation "$mode" "${products[@]}" \
        --out "$out/roofline-$device.json"
fi
if wanted time; then
    part "where an iteration's time goes" \
        "$python" benchmarks/where_time_goes.py --device "$device" --simulation "$mode" "${shares[@]}" \
        --out "$out/where_time_goes-$device.json"
fi
if wanted scale; then
    part "growth over environments, agents and width" \
        "$python" benchmarks/scale.py --device "$device" --mode "$mode" "${growth[@]}" --out "$out/scale-$device.json"
fi
if wanted train; then
    part "speed: tdmarl eager beside a TorchRL loop" \
        "$python" "${common[@]}" --contenders tdmarl torchrl --mode eager
    for fast in compile cudagraph; do
        [ "$fast" = cudagraph ] && [ "${device%%:*}" != cuda ] && continue
        part "speed: tdmarl with mode=$fast" "$python" "${common[@]}" --contenders tdmarl --mode "$fast"
    done
    for algorithm in qmix maddpg; do
        part "speed: $algorithm beside a TorchRL loop" \
            "$python" benchmarks/train.py --algorithm "$algorithm" "${offpolicy[@]}" --device "$device" \
            --contenders tdmarl torchrl --mode eager --eval-every 100 --output "$out/train-$device.json"
    done
    part "speed: IPPO on simple_spread" \
        "$python" benchmarks/ippo.py "${iterations[@]}" --modes "$mode" --device "$device" --out "$out/ippo-$device.json"
    part "speed: HAPPO and its kin beside unshared MAPPO" \
        "$python" benchmarks/happo_train.py "${sequential[@]}" --device "$device" --out "$out/happo_train-$device.json"
    part "speed: tdmarl beside BenchMARL" \
        "$python" "${common[@]}" --contenders tdmarl benchmarl --mode eager "${benchmarl[@]}" \
        --output "$out/train-$device-benchmarl.json"
fi

ls -l "$out"
if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
