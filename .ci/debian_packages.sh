# Sourced by the scripts beside it: programs of a newer Debian, unpacked into a folder and not installed.

# unpack_from_debian SUITE FOLDER PACKAGES: asks the Debian mirrors apt is configured with; says why when it cannot.
unpack_from_debian() {
  local suite="$1" folder="$2" tool work keyring mirrors mirror package
  shift 2
  for tool in apt-get dpkg-deb; do
    command -v "$tool" >/dev/null || { echo "no $tool here" >&2; return 1; }
  done
  # An apt of its own: other sources, state and cache; nothing of the system is touched.
  work="$(mktemp -d)"
  mkdir -p "$work"/{state/lists/partial,cache/archives/partial,sources,debs}
  local private=(
    -o "Dir::State=$work/state" -o "Dir::Cache=$work/cache" -o Dir::State::status=/dev/null
    -o Dir::Etc::sourcelist=/dev/null -o "Dir::Etc::sourceparts=$work/sources" -o APT::Sandbox::User=
  )
  keyring=/usr/share/keyrings/debian-archive-keyring.gpg
  mirrors="$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 2>/dev/null | grep -E '/debian/?$' | sort -u || true)"
  for mirror in $mirrors; do
    {
      printf 'Types: deb\nURIs: %s\nSuites: %s\nComponents: main\n' "$mirror" "$suite"
      [ ! -f "$keyring" ] || printf 'Signed-By: %s\n' "$keyring"
    } > "$work/sources/newer.sources"
    if apt-get "${private[@]}" update -qq -o APT::Update::Error-Mode=any >"$work/log" 2>&1 &&
      (cd "$work/debs" && apt-get "${private[@]}" download -qq "$@") >>"$work/log" 2>&1; then
      for package in "$work"/debs/*.deb; do
        dpkg-deb -x "$package" "$folder"
      done
      rm -rf "$work"
      return
    fi
  done
  [ -z "$mirrors" ] || tail -3 "$work/log" >&2
  echo "apt has no mirror with Debian $suite (tried: ${mirrors:-none})" >&2
  rm -rf "$work"
  return 1
}
