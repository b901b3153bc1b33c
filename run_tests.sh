#!/usr/bin/env bash
# The same set-up as launch_training.sh, then all checks and tests. Says at the end what was skipped and why.
#
#   ./run_tests.sh           everything
#   ./run_tests.sh --quick   ruff, mypy, import contracts, generated files and the short unit tests
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

make_environment examples,integrations,data,dashboards,inference,test
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
"$bin/obsinfra" alerts check --skip-secrets
"$bin/obsinfra" docs check
"$bin/obsinfra" dashboards check

if [ "$quick" = no ]; then
  # The stack and browser tests use the real programs; install them where that is possible, else they skip with a
  # reason. Other tests use their tools.
  missing=()
  command -v prometheus >/dev/null || missing+=(prometheus)
  command -v prometheus-alertmanager >/dev/null || command -v alertmanager >/dev/null || missing+=(prometheus-alertmanager)
  command -v chromium >/dev/null || missing+=(chromium)
  command -v strace >/dev/null || missing+=(strace)
  command -v dockerd >/dev/null || missing+=(docker.io)
  command -v iptables >/dev/null || missing+=(iptables)
  command -v ip >/dev/null || missing+=(iproute2)
  if [ ${#missing[@]} -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing for the tests: ${missing[*]}"
    apt_install "${missing[@]}"
  fi
  # The same on a newer Prometheus and Alertmanager, which are only unpacked.
  if "$here/.ci/newer_stack.sh" "$venv/newer-stack"; then
    export OBSINFRA_NEWER_STACK="$venv/newer-stack"
  fi
  # Where the Compose plugin is installed, that one; else Debian's newer one, for the tests alone.
  docker compose version >/dev/null 2>&1 || "$here/.ci/docker_compose.sh" "$venv/docker" || true
fi

step "tests"
# One more process than processors: many tests wait for what they started.
parallel=(-n "$(($(getconf _NPROCESSORS_ONLN) + 1))" --dist loadfile --no-loadscope-reorder)
if [ "$quick" = yes ]; then
  parallel+=(-m "not (slow or stack or browser or gpu or long)")
fi
"$bin/python" -m pytest -q "${parallel[@]}" "$@" && exit 0 || code=$?
[ "$code" = 1 ] && [ "$quick" = no ] || exit "$code"

# Tests with real stacks and kills wait for each other's processor time. A few failures are tried once more with the
# machine to themselves: what fails again is broken, what passes is named here and is a test to mend.
few=5
failed="$("$bin/python" -c 'import json; print(*json.load(open(".pytest_cache/v/cache/lastfailed")), sep="\n")')"
count="$(wc -l <<<"$failed")"
if [ "$count" -gt "$few" ]; then
  echo "$count tests failed: too many to blame on a busy machine (at most $few are tried again)" >&2
  exit "$code"
fi
step "once more, alone"
"$bin/python" -m pytest -q --last-failed --last-failed-no-failures none -n 0 "$@"
printf 'passed alone, failed beside the others:\n%s\n' "$failed"
