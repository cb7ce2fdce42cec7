#!/bin/sh
# Brings the browser in which the tests open reports. Never fails: without one those tests say what is missing, and with
# CI=true they fail.
set -u

for name in "${ENGINESMITH_CHROMIUM:-}" chromium chromium-browser google-chrome google-chrome-stable; do
    if [ -n "$name" ] && command -v "$name" >/dev/null 2>&1; then
        exit 0
    fi
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "browser: none found; installing chromium with apt-get" >&2
    export DEBIAN_FRONTEND=noninteractive
    install="apt-get install --yes --quiet --no-install-recommends chromium"
    if $install >/dev/null 2>&1 || { apt-get update --quiet >/dev/null 2>&1 && $install >/dev/null; }; then
        exit 0
    fi
    echo "browser: apt-get could not install chromium" >&2
fi
echo "browser: no Chromium or Chrome; tests of reports in a browser will be skipped. Install the package 'chromium'," >&2
echo "browser: or set ENGINESMITH_CHROMIUM to the program" >&2
