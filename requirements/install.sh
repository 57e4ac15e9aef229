#!/bin/sh
# Build one virtual environment from one lock: requirements/install.sh LOCK ENVIRONMENT STAMP [BASE]
# It sees the packages of the environment BASE, too, where one is named.
# The stamp (its name holds the lock's sha256) is written last, so that a build that was cut off is built again.
set -eu
lock=$1 environment=$2 stamp=$3 base=${4:-}
python=${PYTHON:-python3}
[ -z "$base" ] || python=$base/bin/python
# The environment's size as built, in GB, and one to unpack in.
case $lock in
*serve-gpu.txt) need_gb=10 ;;
*serve-cpu.txt) need_gb=8 ;;
*sbom.txt | *ray.txt) need_gb=2 ;;
*) need_gb=9 ;;
esac

die() { echo "setup: $*" >&2; exit 1; }
command -v "$python" >/dev/null || die "no '$python' on the PATH; install Python 3.11 or newer, or name one: make setup PYTHON=python3.11"
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' ||
    die "$("$python" --version) found, Python 3.11 to 3.13 needed; name one: make setup PYTHON=python3.11"
"$python" -c 'import venv, ensurepip' 2>/dev/null || die "$python has no venv module; install it (Debian: apt-get install python3-venv)"
rm -rf "$environment"
free_gb=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
[ "$free_gb" -ge "$need_gb" ] || die "$free_gb GB free here, $need_gb GB needed for $environment; free some disk and run again"

echo "setup: building $environment from $lock (about $((need_gb - 1)) GB, minutes)"
"$python" -m venv "$environment"
# --no-deps: the lock names everything, so pip has nothing to resolve, only hashes to check. What has no wheel is built by what
# build.txt locks, not by what the index has newest.
for locked in requirements/build.txt "$lock"; do
    "$environment/bin/pip" install -qq --disable-pip-version-check --no-deps --no-build-isolation --require-hashes -r "$locked" ||
        die "pip could not install $locked (its message is above); mend that and run again"
done
if [ -n "$base" ]; then
    packages='import sysconfig; print(sysconfig.get_path("purelib"))'
    "$python" -c "$packages" > "$("$environment/bin/python" -c "$packages")/base.pth"
fi
touch "$stamp"
