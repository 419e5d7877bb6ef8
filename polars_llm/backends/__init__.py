"""Who answers. Each SDK is imported only inside its own file.

    openai.py, anthropic.py   batch services, and the hosts that speak as they do (`hosts.py` is the table)
    realtime.py               the same requests, one call each; `gate.py` (one run), `pace.py` (how fast)
    vllm/                     models that the user runs: in this process, or on a Ray cluster
    wire/                     how requests and answers are written; pure

Beneath all: `base.py` (what the heart asks of a backend, the table of errors), `replies.py`, `clients.py`.
"""
