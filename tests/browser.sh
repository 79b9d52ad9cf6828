#!/bin/bash
# Installs the browser that tests/browser.py drives, as root on Debian. Nothing if it is there.
set -euo pipefail
command -v chromium >/dev/null && exit 0
if ((EUID != 0)) || ! command -v apt-get >/dev/null; then
  echo "tests/browser.py: chromium must be installed by root (apt); without it these tests skip"
  exit 0
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core
