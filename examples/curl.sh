#!/bin/sh
# Lose a connection and come back, by hand, with curl:   examples/curl.sh [http://127.0.0.1:8080] [model]
set -u
leave_after=${LEAVE_AFTER:-2} # seconds
server=${1:-http://127.0.0.1:8080}
model=${2:-mock-llm}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

body='{"model": "'$model'", "stream": true, "messages": [{"role": "user", "content": "Tell me about streams."}]}'

# The texts of the events in a file, put together.
texts() {
    sed -n 's/^data: .*"delta":{[^}]*"content":"\(\([^"\\]\|\\.\)*\)".*/\1/p' "$@" | tr -d '\n'
    echo
}

echo "== 1. A generation that may go on for 60 s without a reader; curl leaves after $leave_after s"
curl --no-buffer --silent --max-time "$leave_after" --dump-header "$work/head" "$server/v1/chat/completions" \
    -H 'Content-Type: application/json' -H 'X-Stream-Detach-Grace: 60' -d "$body" >"$work/first"
stream=$(sed -n 's/^x-stream-id: \([^[:cntrl:]]*\).*/\1/Ip' "$work/head")
[ -n "$stream" ] || { echo "no stream came back:" && cat "$work/head" "$work/first" && exit 1; }

# An event is whole when its blank line came: of one that broke off, the id doesn't count.
last=$(awk '/^id: / {id = $2} /^data:/ {data = 1} /^$/ && data {whole = id; data = 0} END {print whole}' "$work/first")
texts "$work/first"

echo "== 2. The rest of stream $stream, after $last"
sleep "$leave_after" # nobody reads, and the generation goes on
curl --no-buffer --silent --fail-with-body "$server/v1/streams/$stream" -H "Last-Event-ID: $last" >"$work/rest"
texts "$work/rest"
# What was missed came in few events: many texts in one, with the id of the last.
echo "   in $(grep -c '^data:' "$work/rest") events, the last of them ${last%:*}:$(sed -n 's/^id: .*://p' "$work/rest" | tail -1)"

echo "== 3. Nothing more: 204, which also stops an EventSource"
last=$(sed -n 's/^id: //p' "$work/rest" | tail -1)
curl --silent --output /dev/null --write-out '%{http_code}\n' "$server/v1/streams/$stream" -H "Last-Event-ID: $last"

echo "== 4. Another generation, stopped: DELETE ends it for everybody"
curl --no-buffer --silent --dump-header "$work/head" "$server/v1/chat/completions" \
    -H 'Content-Type: application/json' -d "$body" >"$work/stopped" &
reader=$!
until [ -s "$work/stopped" ] && grep -qi '^x-stream-id' "$work/head"; do sleep 0.1; done
stream=$(sed -n 's/^x-stream-id: \([^[:cntrl:]]*\).*/\1/Ip' "$work/head")
curl --silent --output /dev/null --write-out '%{http_code}\n' --request DELETE "$server/v1/streams/$stream"
wait "$reader"
status=$?
echo "   what its reader was told, and curl's exit status, because the answer did not come to its end:"
grep '^data:' "$work/stopped" | tail -1
echo "$status"
