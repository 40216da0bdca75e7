#!/usr/bin/env bash
# GRPO on this host{% if servers %}: {{ trainer_gpus }} GPU(s) train, {{ servers }} SGLang server(s) of {{ width }} GPU(s) generate{% endif %}.
# Stopped and started again it resumes. Keys, if any, come from the environment: {{ key }}, {{ judge_key }}.
set -euo pipefail

run={{ run }}
config=({{ source }}{% for override in overrides %} {{ override }}{% endfor %})
{% if servers %}
folders=() urls='' keepers=()

serve() {  # its GPUs, its port: starts a server, and again when it died
    local folder="$run/engine/$2" flags={{ flags }}
    folders+=("$folder")
    urls+="\"http://127.0.0.1:$2\","
    while :; do
        CUDA_VISIBLE_DEVICES="$1" omni-fast engine up --folder "$folder" -- "${config[@]}" engine.servers=1 \
            "$flags\"--host\", \"127.0.0.1\", \"--port\", \"$2\"]" || true
        sleep 20
    done >"$run/engine/$2.out" 2>&1 &
    keepers+=($!)
}

stop() {
    kill "${keepers[@]}" || true
    wait "${keepers[@]}" || true
    for folder in "${folders[@]}"; do omni-fast engine down --folder "$folder" || true; done
}

mkdir -p -- "$run/engine"
trap stop EXIT
for ((gpu = {{ trainer_gpus }}; gpu + {{ width }} <= {{ gpus }}; gpu += {{ width }})); do
    serve "$(seq -s, "$gpu" $((gpu + {{ width }} - 1)))" $(({{ port }} + gpu))
done
CUDA_VISIBLE_DEVICES={{ devices }} {% for word in trainer %}{{ word }} {% endfor %}train --run "$run" -- "${config[@]}" "engine.urls=[$urls]" &
trainer=$!
trap 'kill -TERM "$trainer"' TERM  # it finishes the step, saves, and stops
trap : INT  # a terminal's goes to the trainer by itself
code=0
wait "$trainer" || code=$?
while kill -0 "$trainer" 2>/dev/null; do code=0; wait "$trainer" || code=$?; done
exit "$code"
{% else %}
exec {% for word in trainer %}{{ word }} {% endfor %}train --run "$run" -- "${config[@]}"
{% endif %}
