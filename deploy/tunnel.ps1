# A Cloudflare tunnel to a service on this machine:  deploy\tunnel.ps1 start|stop|status [-Port 8000]
# The service must run with keys. With TUNNEL_TOKEN set, the named tunnel of that token runs; otherwise one with a passing address.
param([Parameter(Mandatory)][ValidateSet("start", "stop", "status")][string]$Action, [int]$Port = 8000)
$ErrorActionPreference = "Stop"
$State = Join-Path $env:LOCALAPPDATA "pillsnap-tunnel"
$Log = Join-Path $State "cloudflared.log"
$PidFile = Join-Path $State "pid"

function Get-Tunnel {
    if (Test-Path $PidFile) { Get-Process -Id (Get-Content $PidFile) -ErrorAction SilentlyContinue | Where-Object ProcessName -eq "cloudflared" }
}
function Get-Address {
    if (Test-Path $Log) { Select-String -Path $Log -Pattern "https://[a-z0-9-]+\.trycloudflare\.com" | ForEach-Object { $_.Matches[0].Value } | Select-Object -Last 1 }
}
function Show-Status {
    $Tunnel = Get-Tunnel
    if (-not $Tunnel) { "not running"; exit 3 }
    $Address = Get-Address
    "running, process $($Tunnel.Id), $(if ($Address) { $Address } else { 'the named tunnel' })"
}

switch ($Action) {
    "start" {
        if (-not (Get-Command cloudflared -ErrorAction SilentlyContinue)) { "cloudflared is not installed: get it from Cloudflare's download page"; exit 1 }
        if (Get-Tunnel) { "the tunnel runs already"; exit 1 }
        try { Invoke-WebRequest "http://127.0.0.1:$Port/version" -TimeoutSec 5 -UseBasicParsing | Out-Null; $Code = 200 } catch { $Code = [int]$_.Exception.Response.StatusCode }
        if ($Code -ne 401) { "http://127.0.0.1:$Port does not ask for a key: start it with a key, without --insecure-localhost"; exit 1 }
        New-Item -ItemType Directory -Force $State | Out-Null
        $Words = if ($env:TUNNEL_TOKEN) { @("tunnel", "run") } else { @("tunnel", "--url", "http://127.0.0.1:$Port") }
        $Process = Start-Process cloudflared -ArgumentList $Words -RedirectStandardError $Log -WindowStyle Hidden -PassThru
        Set-Content $PidFile $Process.Id
        foreach ($i in 1..60) {
            if ($Process.HasExited) { "cloudflared ended:"; Get-Content $Log -Tail 5; Remove-Item $PidFile; exit 1 }
            if ($env:TUNNEL_TOKEN -or (Get-Address)) { break }
            Start-Sleep -Milliseconds 500
        }
        Show-Status
    }
    "stop" { Get-Tunnel | Stop-Process; Remove-Item $PidFile -ErrorAction SilentlyContinue; "stopped" }
    "status" { Show-Status }
}
