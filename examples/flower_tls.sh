#!/usr/bin/env bash
# Flower with TLS and authenticated SuperNodes, all on this machine and without internet: examples/flower_tls.sh FOLDER [KEY=VALUE ...]
# On several machines: the address of the SuperLink in place of 127.0.0.1 (in the certificate too), each SuperNode where its data is.
set -euo pipefail
app="$(cd "$(dirname "$0")" && pwd)/flower_app"
folder="$(mkdir -p "$1" && cd "$1" && pwd)"
shift
cd "$folder"
export FLWR_HOME="$folder/home" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

# An authority of our own, and the SuperLink's certificate, which names the address that others know it by.
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -days 365 -subj "/CN=our authority" \
  -keyout ca.key -out ca.crt 2>/dev/null
openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -subj "/CN=superlink" -keyout server.key -out server.csr 2>/dev/null
openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 365 -out server.pem \
  -extfile <(echo "subjectAltName=IP:127.0.0.1,DNS:localhost") 2>/dev/null
# Each SuperNode makes its key; only the public half leaves its machine.
for node in 0 1; do ssh-keygen -q -t ecdsa -b 384 -N "" -C "" -f "node$node"; done

flower-superlink --ssl-ca-certfile ca.crt --ssl-certfile server.pem --ssl-keyfile server.key --enable-supernode-auth \
  --host 127.0.0.1 --port 8443 >superlink.log 2>&1 &
until curl --silent --fail --noproxy '*' --cacert ca.crt https://127.0.0.1:8443/health >/dev/null; do
  sleep 1
  kill -0 $! || { tail superlink.log; exit 1; }
done

mkdir -p home
printf '[superlink]\ndefault = "tls"\n\n[superlink.tls]\naddress = "127.0.0.1:8443"\nroot-certificates = "%s/ca.crt"\n' "$folder" \
  >home/config.toml
for node in 0 1; do flwr supernode register "node$node.pub" tls; done

# Which clients a node has (their numbers, in the order of data.domains); elsewhere add data-root="/where/its/images/lie".
clients=("0,1,2" "3,4")
for node in 0 1; do
  flower-supernode --root-certificates ca.crt --auth-supernode-private-key "node$node" --superlink 127.0.0.1:8443 \
    --port "910$node" --node-config "partition-id=\"${clients[$node]}\" state-folder=\"$folder/disk$node\"" >"node$node.log" 2>&1 &
done

flwr run "$app" tls --run-config "out=\"$folder/run\" $*"
until [ -e run/summary.json ]; do
  sleep 2
  kill -0 $(jobs -p) || { tail ./*.log; exit 1; }
done
cat run/metrics.jsonl run/summary.json
