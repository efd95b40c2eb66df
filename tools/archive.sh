#!/usr/bin/env bash
# Installs what tests/test_network.py runs against, where that is allowed: Debian's Orthanc with DICOMweb, and dcmtk.
# They are not started here, nor by Debian: each test starts its own, at free ports of this machine, and stops it.
set -euo pipefail
missing=()
[ -x /usr/bin/storescu ] || missing+=(dcmtk)
[ -x /usr/sbin/Orthanc ] || missing+=(orthanc)
[ -e /usr/share/orthanc/plugins/libOrthancDicomWeb.so ] || missing+=(orthanc-dicomweb)
[ ${#missing[@]} -gt 0 ] || exit 0
[ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || { echo "not root on Debian, so not installed: ${missing[*]}"; exit 1; }
policy=/usr/sbin/policy-rc.d # as in Debian's containers: no service starts when it is installed
if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' > $policy
    chmod +x $policy
    trap 'rm -f $policy' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
install() { timeout 300 apt-get install -y -q --no-install-recommends "${missing[@]}"; }
install || { timeout 300 apt-get update -q && install; } || { echo "could not be installed: ${missing[*]}"; exit 1; }
