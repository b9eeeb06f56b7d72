#!/usr/bin/env bash
# Makes ../niivue.js again from the locked npm packages. Needs Node.js 20 or newer and npm; volcast itself needs neither.
# The codecs of Zarr, 60 % of the bundle, stay out: they are loaded when a Zarr store is opened, which the page never does.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp "$here"/package.json "$here"/package-lock.json "$work"
cd "$work"
npm ci --silent --no-audit --no-fund
version=$(node -p 'JSON.parse(require("fs").readFileSync("node_modules/@niivue/niivue/package.json")).version')
echo 'export { Niivue, NVImage, SLICE_TYPE, SHOW_RENDER, MULTIPLANAR_TYPE } from "@niivue/niivue";' >entry.js
npx esbuild entry.js --bundle --minify --format=esm --target=es2022 --external:numcodecs/* --legal-comments=none \
  --log-level=warning --banner:js="/*! NiiVue $version, BSD-2-Clause; this file's licences: niivue.LICENSE.txt */" \
  --outfile="$here/../niivue.js"
{
  printf 'niivue.js holds NiiVue %s (https://github.com/niivue/niivue) and parts of the packages named below.\n\n' "$version"
  cat "$here/LICENSE.niivue"
  for package in @lukeed/uuid @ungap/structured-clone @zarrita/storage array-equal fflate gl-matrix nifti-reader-js zarrita; do
    printf '\n---- %s\n' "$package"
    cat node_modules/"$package"/[Ll][Ii][Cc][Ee][Nn][Ss][Ee]*
  done
} >"$here/../niivue.LICENSE.txt"
cd "$here/.." && sha256sum niivue.js >vendor/niivue.sha256
