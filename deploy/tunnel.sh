#!/usr/bin/env bash
# A Cloudflare tunnel to a service on this machine, so that a phone can reach it:  deploy/tunnel.sh start|stop|status [PORT]
# The service must run with keys. With TUNNEL_TOKEN set, the named tunnel of that token runs; otherwise one with a passing address.
set -euo pipefail
port=${2:-8000}
state=${XDG_STATE_HOME:-$HOME/.local/state}/pillsnap-tunnel
log=$state/cloudflared.log
pid() { cat "$state/pid" 2>/dev/null || true; }
running() { [ -n "$(pid)" ] && [ "$(ps -o comm= -p "$(pid)" 2>/dev/null)" = cloudflared ]; }
address() { grep -o 'https://[a-z0-9-]*\.trycloudflare\.com' "$log" 2>/dev/null | tail -1; }

case ${1:-} in
start)
    command -v cloudflared >/dev/null || { echo "cloudflared is not installed: get it from Cloudflare's download page"; exit 1; }
    if running; then echo "the tunnel runs already: ${0} status"; exit 1; fi
    if [ "$(curl -s -o /dev/null -w '%{http_code}' -m 5 "http://127.0.0.1:$port/version" || true)" != 401 ]; then
        echo "http://127.0.0.1:$port does not ask for a key: start it with \`pillsnap serve --port $port\` and a key, without --insecure-localhost"; exit 1
    fi
    mkdir -p "$state"
    if [ -n "${TUNNEL_TOKEN:-}" ]; then nohup cloudflared tunnel run >"$log" 2>&1 & else nohup cloudflared tunnel --url "http://127.0.0.1:$port" >"$log" 2>&1 & fi
    echo $! >"$state/pid"
    for _ in $(seq 60); do
        kill -0 "$(pid)" 2>/dev/null || { echo "cloudflared ended:"; tail -5 "$log"; rm -f "$state/pid"; exit 1; }
        if [ -n "${TUNNEL_TOKEN:-}" ] || [ -n "$(address || true)" ]; then break; fi
        sleep 0.5
    done
    exec bash "$0" status "$port" ;;
stop)
    if running; then kill "$(pid)"; fi
    rm -f "$state/pid"
    echo stopped ;;
status)
    if running; then echo "running, process $(pid), $(address || echo 'the named tunnel')"; else echo "not running"; exit 3; fi ;;
*)
    echo "usage: $0 start|stop|status [PORT]"; exit 2 ;;
esac
