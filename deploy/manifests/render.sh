#!/usr/bin/env bash
# Renders the plain manifests from the chart into this directory, or into the directory that is the first argument.
# HELM is the helm program to use, 3.18 or later.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here}
render() {
    local file=$1
    shift
    {
        echo "# deploy/manifests/render.sh rendered this from deploy/chart/swiftcache. Change the chart, not this file."
        "${HELM:-helm}" template swiftcache "$here/../chart/swiftcache" \
            --namespace swiftcache --kube-version "${KUBE_VERSION:-1.37.0}" "$@" 2>"$out/.stderr" ||
            { cat "$out/.stderr" >&2; exit 1; }
    } | grep -v '^ *app.kubernetes.io/managed-by: Helm$' | grep -v '^ *helm.sh/chart: ' >"$out/$file"
    rm -f "$out/.stderr"
}
render swiftcache.yaml
# Objects that need the Prometheus operator and Grafana's sidecar.
render monitoring.yaml --show-only templates/monitoring.yaml \
    --set metrics.podMonitor.enabled=true \
    --set metrics.prometheusRule.enabled=true \
    --set metrics.grafanaDashboard.enabled=true
