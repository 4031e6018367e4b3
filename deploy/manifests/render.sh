#!/usr/bin/env bash
# Renders the plain manifests from the chart into this directory, or into the directory that is the first argument. Either all
# of them are replaced, or none.
# HELM is the helm program to use, 3.18 or later. IMAGE is the image, with its registry.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here}
image=${IMAGE:-registry.example/swiftcache}
# Beside the results, so that they are put in place by a rename.
new=$(mktemp -d "$out/.render.XXXXXX")
trap 'rm -rf "$new"' EXIT
render() {
    local file=$1
    shift
    "${HELM:-helm}" template swiftcache "$here/../chart/swiftcache" \
        --namespace swiftcache --kube-version "${KUBE_VERSION:-1.37.0}" \
        --set "image.repository=$image" "$@" >"$new/rendered" 2>"$new/said" || { cat "$new/said" >&2; exit 1; }
    {
        echo "# deploy/manifests/render.sh rendered this from deploy/chart/swiftcache. Change the chart, not this file."
        if grep -q 'image: registry.example/' "$new/rendered"; then
            echo "# registry.example stands for the registry that your nodes pull from: replace it, or run"
            echo "# IMAGE=REGISTRY/swiftcache deploy/manifests/render.sh"
        fi
        grep -v -e '^ *app.kubernetes.io/managed-by: Helm$' -e '^ *helm.sh/chart: ' "$new/rendered"
    } >"$new/$file"
}
render swiftcache.yaml
# Objects that need the Prometheus operator and Grafana's sidecar.
render monitoring.yaml --show-only templates/monitoring.yaml \
    --set metrics.podMonitor.enabled=true \
    --set metrics.prometheusRule.enabled=true \
    --set metrics.grafanaDashboard.enabled=true
mv "$new/swiftcache.yaml" "$new/monitoring.yaml" "$out/"
