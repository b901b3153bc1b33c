#!/usr/bin/env bash
# The same set-up as launch_training.sh, then all checks and tests. Says at the end what was skipped and why.
#
#   ./run_tests.sh           everything
#   ./run_tests.sh --quick   ruff, mypy, import contracts, generated files and unit tests
#   ./run_tests.sh [--quick] -- PYTEST OPTIONS
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
cd "$here"
source "$here/.ci/environment.sh"

quick=no
while [ $# -gt 0 ]; do
  case "$1" in
    --quick) quick=yes ;;
    --) shift; break ;;
    *) echo "error: unknown option $1; expected --quick, or -- followed by pytest options" >&2; exit 2 ;;
  esac
  shift
done

make_environment examples,test
bin="$venv/bin"

step() { printf '\n== %s\n' "$1"; }

step "ruff"
"$bin/ruff" check .
"$bin/ruff" format --check .
step "mypy --strict"
"$bin/mypy"
step "import contracts"
"$bin/lint-imports" --no-cache
step "generated files"
"$bin/obsinfra" rules check
"$bin/obsinfra" docs check

step "tests"
# The unit tests share the processors; what measures or starts whole programs runs alone, one after the other.
unit="not slow and not stack and not browser and not gpu"
"$bin/python" -m pytest -q -n auto --dist loadfile -m "$unit" "$@"
if [ "$quick" = yes ]; then
  exit
fi
# The stack and browser tests use the real programs; install them where that is possible, else they skip with a reason.
missing=()
command -v prometheus >/dev/null || missing+=(prometheus)
command -v prometheus-alertmanager >/dev/null || command -v alertmanager >/dev/null || missing+=(prometheus-alertmanager)
command -v chromium >/dev/null || missing+=(chromium)
if [ ${#missing[@]} -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "installing for the tests: ${missing[*]}"
  apt_install "${missing[@]}"
fi
exec "$bin/python" -m pytest -q -m "not ($unit)" "$@"
