#!/usr/bin/env bash
#SBATCH --job-name={{ name }}
#SBATCH --nodes={{ nodes }}
#SBATCH --ntasks-per-node=1
{% if gpus %}
#SBATCH --gpus-per-node={{ gpus }}
{% endif %}
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300
{% for line in lines %}
#SBATCH {{ line }}
{% endfor %}
# GRPO{% if servers %}: {{ trainer_gpus }} GPU(s) of the first node train, {{ servers }} SGLang server(s) of {{ width }} GPU(s) on {{ nodes }} node(s) generate{% endif %}.
# Submitted again it resumes. All nodes see this folder under the same path, and omni-fast with SGLang's environment
# (`omni-fast engine install`). Keys, if any, come from the environment of sbatch: {{ key }}, {{ judge_key }}.
set -euo pipefail

run={{ run }}
config=({{ source }}{% for override in overrides %} {{ override }}{% endfor %})
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

on() {  # in the background alone: a node, its GPUs, and a command
    local node="$1" gpus="$2"
    shift 2
    exec srun --nodes=1 --ntasks=1 --overlap --nodelist="$node"{% if gpus %} --gpus-per-node={{ gpus }}{% endif %} --cpu-bind=none \
        env{% if gpus %} CUDA_VISIBLE_DEVICES="$gpus"{% endif %} "$@"
}
{% if servers %}

urls=''
keep='while :; do omni-fast engine up "$@" || true; sleep 20; done'
serve() {  # a node, its GPUs, a port: starts a server, and again when it died
    local flags={{ flags }}
    urls+="\"http://$1:$3\","
    on "$1" "$2" bash -c "$keep" serve --folder "$run/engine/$1-$3" -- "${config[@]}" engine.servers=1 \
        "$flags\"--host\", \"0.0.0.0\", \"--port\", \"$3\"]" >"$run/engine/$1-$3.out" 2>&1 &
}

mkdir -p -- "$run/engine"
first={{ trainer_gpus }}  # the first node's GPUs before it train
for node in "${nodes[@]}"; do
    for ((gpu = first; gpu + {{ width }} <= {{ gpus }}; gpu += {{ width }})); do
        serve "$node" "$(seq -s, "$gpu" $((gpu + {{ width }} - 1)))" $(({{ port }} + gpu))
    done
    first=0
done
{% endif %}

on "${nodes[0]}" {{ devices }} {% for word in trainer %}{{ word }} {% endfor %}train --run "$run" -- "${config[@]}"{% if servers %} "engine.urls=[$urls]"{% endif %} &
trainer=$!
trap 'jobs -p | xargs -r kill' EXIT
trap 'kill -TERM "$trainer"' TERM  # it finishes the step, saves, and stops
code=0
wait "$trainer" || code=$?
while kill -0 "$trainer" 2>/dev/null; do code=0; wait "$trainer" || code=$?; done
exit "$code"
