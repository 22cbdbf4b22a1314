#!/bin/sh
# Install genpipe and all that its services need into a new virtual environment: what the image is built with.
#   infra/images/install.sh TARGET [cpu|cuda]
# cpu takes PyTorch's build without CUDA, from the package index that TORCH_INDEX_URL names; where pip's usual index
# has a CPU build, leave it empty. PYTHON names the interpreter.
set -eu
target=$1
variant=${2:-cpu}
source=$(cd "$(dirname "$0")/../.." && pwd)
torch=$(sed -n 's/^\(torch==[0-9.]*\).*/\1/p' "$source/constraints.txt")

case $variant in
cpu) index=${TORCH_INDEX_URL:+--index-url $TORCH_INDEX_URL} ;;
cuda) index= ;;
*)
	echo "install.sh: $variant is not a variant; use cpu or cuda" >&2
	exit 2
	;;
esac

"${PYTHON:-python3}" -m venv "$target"
pip() { "$target/bin/python" -m pip install --quiet --no-cache-dir --constraint "$source/constraints.txt" "$@"; }
# shellcheck disable=SC2086  # an option and its value, or nothing
pip $index "$torch"
pip "${source}[cluster,demo,text-encoders]"
"$target/bin/genpipe" --help >/dev/null
