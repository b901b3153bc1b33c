# Sourced by launch_training.sh and run_tests.sh: the virtual environment, and the stack's binaries.
venv="$here/.venv"

# make_environment EXTRAS: .venv with the pinned dependencies; does nothing when it is up to date.
make_environment() {
  local extras="$1" stamp wanted python
  wanted="$(cat "$here/pyproject.toml" "$here/constraints.txt" | sha256sum | cut -c1-32)"
  stamp="$venv/.obsinfra-$(echo "$extras" | tr ',' '-')"
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    return
  fi
  python="${PYTHON:-python3}"
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: $python is $("$python" --version 2>&1 || echo missing); expected Python 3.11 or newer; fix: PYTHON=/path/to/python3.11 $0" >&2
    exit 2
  fi
  echo "installing into .venv (extras: $extras) …" >&2
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  # torch first and exactly pinned, so that no other package pulls in a larger build of it.
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$here/constraints.txt" torch
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$here/constraints.txt" -e "$here[$extras]"
  echo "$wanted" > "$stamp"
}

# install_stack: Prometheus and Alertmanager from the distribution, for Debian and Ubuntu as root.
install_stack() {
  if command -v prometheus >/dev/null && { command -v prometheus-alertmanager || command -v alertmanager; } >/dev/null; then
    return
  fi
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "error: --install-stack needs root on Debian or Ubuntu; expected apt-get; fix: install prometheus and alertmanager yourself and put them on PATH" >&2
    exit 2
  fi
  echo "installing Prometheus and Alertmanager …" >&2
  apt_install prometheus prometheus-alertmanager
}

# apt_install PACKAGES: quietly, without starting the packages' own services.
apt_install() {
  local log
  log="$(mktemp)"
  export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
  if ! { apt-get update -qq && apt-get install -y -qq --no-install-recommends "$@"; } >"$log" 2>&1; then
    tail -5 "$log" >&2
    echo "error: apt-get could not install: $*" >&2
    exit 1
  fi
  rm -f "$log"
}
