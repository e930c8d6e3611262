"""A device process without a device, for the tests of its supervisor. Its arguments: what it does."""

import array
import json
import os
import socket
import sys
import time

behaviour = sys.argv[1:]
channel = socket.socket(fileno=0)
channel.setblocking(True)
listen = None
version = next((int(word[8:]) for word in behaviour if word.startswith("version=")), 1)


def send(message):
    try:
        channel.send(json.dumps(message).encode())
    except (BrokenPipeError, ConnectionResetError):
        # The supervisor left; the next one connects.
        pass


def receive():
    try:
        data, control, _, _ = channel.recvmsg(65536, socket.CMSG_SPACE(4 * 64))
    except ConnectionResetError:
        return None, []
    fds = array.array("i")
    for _, _, payload in control:
        fds.frombytes(payload)
    return (json.loads(data) if data else None), list(fds)


send({"Hello": {"version": version, "session": None}})
while True:
    message, fds = receive()
    if message is None:
        sys.exit(2)
    if isinstance(message, dict) and "Descriptors" in message:
        for purpose, fd in zip(message["Descriptors"], fds):
            if purpose == "Listen":
                listen = socket.socket(fileno=fd)
                listen.setblocking(True)
    if isinstance(message, dict) and "Serve" in message:
        serve = message["Serve"]
        break
if "die-early" in behaviour:
    os._exit(3)
if "fault" in behaviour:
    send({"Fault": {"code": "ring-overflow", "text": "the ring is full", "remedy": None, "errno": 22}})
    time.sleep(100)
send("Ready")
if "nonsense" in behaviour:
    channel.send(b"{")
    time.sleep(100)
while True:
    message, _ = receive()
    if message is None:
        channel, _ = listen.accept()
        channel.setblocking(True)
        send({"Hello": {"version": version, "session": serve["identity"]}})
    elif message == "Stop":
        sys.exit(0)
    else:
        change = {"missing": {"reason": "not-built", "detail": str(message["Change"])}}
        send({"Confined": [["landlock", change]]})
