"""Opens objects of a pgkeep repository, written from docs/format.md alone (numbers in comments are its sections).

reader.py DIR opens every object that DIR/index.json lists, and compares. Needs the package `cryptography`."""
import base64, hashlib, hmac, json, sys
from pathlib import Path
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

class Bad(Exception): pass
def check(ok, why):
    if not ok: raise Bad(why)
def u32(b, at=0): return int.from_bytes(b[at:at + 4], "little")
def LP(*parts): return b"".join(len(p).to_bytes(4, "little") + p for p in parts)
def mac(key, message): return hmac.new(key, message, hashlib.sha256).digest()
def expand(prk, info, n): return mac(prk, info + b"\x01")[:n]          # n <= 32: one block of HKDF-Expand
def hkdf(salt, key, info, n=32): return expand(mac(salt, key), info, n)
def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8): crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF
def lz4(block):
    out, i = bytearray(), 0
    def length(n):
        nonlocal i
        if n == 15:
            while block[i] == 255: n, i = n + 255, i + 1
            n, i = n + block[i], i + 1
        return n
    while True:
        token, i = block[i], i + 1
        n = length(token >> 4)
        out += block[i:i + n]; i += n
        if i >= len(block): return bytes(out)
        offset, i = block[i] | block[i + 1] << 8, i + 2
        n = length(token & 15) + 4
        check(0 < offset <= len(out), "lz4 offset")
        piece = bytes(out[-offset:])                                   # a match may overlap what it makes
        out += (piece * (n // len(piece) + 1))[:n]
def bech32(text):                                                      # of an age key; its checksum is age's business
    letters, bits, n, out = "qpzry9x8gf2tvdw0s3jn54khce6mua7l", 0, 0, bytearray()
    for c in text.lower().rsplit("1", 1)[1][:-6]:
        bits, n = bits << 5 | letters.index(c), n + 5
        if n >= 8: n -= 8; out.append(bits >> n & 255)
    return bytes(out)
def age(identity, data):                                               # https://age-encryption.org/v1, X25519 only
    head, rest = data.split(b"\n--- ", 1)
    header_mac, payload = rest.split(b"\n", 1)
    unb64 = lambda s: base64.b64decode(s + b"=" * (-len(s) % 4))
    own = X25519PrivateKey.from_private_bytes(identity)
    public = own.public_key().public_bytes_raw()
    check(head.startswith(b"age-encryption.org/v1\n"), "not an age file")
    lines = head.split(b"\n")
    for line, body in zip(lines[1:], lines[2:]):
        if not line.startswith(b"-> X25519 "): continue
        share = unb64(line.split()[2])
        key = hkdf(share + public, own.exchange(X25519PublicKey.from_public_bytes(share)), b"age-encryption.org/v1/X25519")
        try: file_key = ChaCha20Poly1305(key).decrypt(bytes(12), unb64(body), None)
        except InvalidTag: continue
        check(mac(hkdf(b"", file_key, b"header"), head + b"\n---") == unb64(header_mac), "age header")
        key = hkdf(payload[:16], file_key, b"payload")                 # 32 bytes of key are one chunk, the last
        return ChaCha20Poly1305(key).decrypt(bytes(11) + b"\x01", payload[16:], None)
    raise Bad("not a recipient")

class Keys:
    def __init__(self, path, realm):                                   # 4.1
        self.realm, self.found = realm, {}
        for line in path.read_text().splitlines():
            if line.startswith("AGE-SECRET-KEY-1"): self.identity = bech32(line)
            if line.startswith("PGKEEP-META-KEY-1-"):
                self.meta, digits = (bytes.fromhex(part) for part in line[18:].split("-"))
                check(hashlib.sha256(b"pgkeep meta key 1" + self.meta).digest()[:4] == digits, "check digits")
    def content(self, folder, id):                                     # 4.2
        data = (folder / "keys" / id.hex()).read_bytes()
        check(data[:10] == b"\x89pgkkey\n\x01\x01", "not a content key")
        n, key = u32(data, 12), hkdf(b"", self.meta, LP(b"pgkeep meta key 1", b"key envelope", self.realm))
        message = LP(b"pgkeep key envelope 1", self.realm, id, data[:16 + n])
        check(hmac.compare_digest(mac(key, message), data[16 + n:]), "key envelope")
        return age(self.identity, data[16:16 + n])

class Object:
    def __init__(self, data, keys, folder, kind, name, repository=b""):
        check(data[:8] == b"\x89pgkeep\n"[:len(data[:8])], "not sealed")                             # 2.1
        check(len(data) >= 96, "cut")
        self.data, self.header = data, data[:96]
        version, self.codec, found_kind, flags = data[8:12]
        check(version == 1, "version")
        check(crc32c(data[:12] + data[16:96]) == u32(data, 12), "header damaged")
        check(self.codec <= 1 and 1 <= found_kind <= 13 and flags <= 1, "unknown codec, kind or flags")
        FORMAT, salt = b"pgkeep sealed object 1", data[80:96]                                        # 2.3
        info = lambda purpose: LP(FORMAT, purpose, keys.realm, repository, bytes([kind]), name.encode())
        prk = mac(salt, keys.meta)
        check(expand(prk, LP(FORMAT, b"commitment"), 16) == data[32:48], "wrong meta key")
        check(found_kind == kind and expand(prk, info(b"binding"), 16) == data[64:80], "another object")
        self.footer_key = AESGCM(expand(prk, info(b"footer"), 32))
        if flags & 1:
            prk = mac(salt, keys.content(folder, data[16:32]))
            check(expand(prk, LP(FORMAT, b"commitment"), 16) == data[48:64], "wrong content key")
        self.frame_key = AESGCM(expand(prk, info(b"frames"), 32))
    def unseal(self, key, type, counter, sealed, plain):                                             # 2.4
        try: return key.decrypt(bytes([type, 0, 0, 0]) + counter.to_bytes(4, "little") + bytes(4), sealed, self.header + plain)
        except InvalidTag: raise Bad("damaged")
    def frame(self, i, at):                                                                          # 2.5
        plain, word = self.data[at:at + 4], u32(self.data, at)
        n, last = word & 0xFFFFFF, word >> 31
        check(len(plain) == 4 and n >= 16 and at + 4 + n <= len(self.data), "cut")
        content = self.unseal(self.frame_key, 2 if last else 1, i, self.data[at + 4:at + 4 + n], plain)
        if word >> 30 & 1:
            check(self.codec == 1, "codec")
            size, content = u32(content), lz4(content[4:])
            check(len(content) == size, "lz4")
        return content, at + 4 + n, word
    def whole(self):                                                                                 # 2.6
        check(self.data[-4:] == b"pgk\n", "cut")
        n = u32(self.data, len(self.data) - 8)
        check(96 + n + 8 <= len(self.data), "cut")
        footer = self.unseal(self.footer_key, 3, 0, self.data[-8 - n:-8], self.data[-8:])
        size, count, at, out = int.from_bytes(footer[:8], "little"), u32(footer, 8), 96, b""
        for i in range(count):
            content, at, word = self.frame(i, at)
            check(word == u32(footer, 12 + 4 * i) and (word >> 31 == 1) == (i == count - 1), "frame list")
            check(i == count - 1 or len(content) == 1 << 20, "frame size")
            out += content
        check(len(out) == size and at + n + 8 == len(self.data), "lengths")
        return out, footer[12 + 4 * count:]
    def tail(self):                                                                                  # 3
        n, out, i, at, word = u32(self.data, 96), b"", 0, 0, 0
        prelude, at = self.unseal(self.footer_key, 4, 0, self.data[100:100 + n], self.data[96:100]), 100 + n
        while not word >> 31:
            try: content, at, word = self.frame(i, at)
            except Bad: break
            out, i = out + content, i + 1
        return out, prelude
class Numbers:                                                                                       # 5, Index
    def __init__(self, data): self.data, self.at = data, 0
    def take(self, n):
        check(self.at + n <= len(self.data), "index is cut")
        self.at += n
        return self.data[self.at - n:self.at]
    def next(self):
        value, shift = 0, 0
        while True:
            byte, = self.take(1)
            value, shift = value | (byte & 127) << shift, shift + 7
            if byte < 128: return value
    def signed(self):
        value = self.next()
        return value >> 1 ^ -(value & 1)
    def rest(self): return Numbers(self.take(self.next()))
def said(data):
    """What an index says: the version that wrote the WAL, who ended where, who went on, restore points and max_connections."""
    n = Numbers(data)
    version, major, start, end, things = n.next(), n.next(), n.next(), n.next(), n.next()
    check(version in (1, 2), "version of the index")
    for _ in range(things): [n.next() for _ in range({0: 3, 1: 2, 2: 1, 3: 1}[n.next()])]
    for _ in range(n.next()): n.rest()
    lists = []
    for _ in range(2):
        count, columns = n.next(), [n.rest() for _ in range(9)]
        xid, at, seen = 0, 0, []
        for _ in range(count):
            xid, at = (xid + columns[0].signed()) % 2**32, (at + columns[1].signed()) % 2**64
            seen.append([xid, f"{at >> 32:X}/{at & 0xFFFFFFFF:X}"])
        lists.append(seen)
    landmarks, at = [], 0
    for _ in range(n.next() if version == 2 else 0):
        kind, at, _, body = n.next(), (at + n.signed()) % 2**64, n.next(), n.rest()
        first = body.signed()
        if kind == 1: landmarks.append([f"{at:X}", body.data[body.at:].decode()])
        if kind == 2: landmarks.append([f"{at:X}", f"max_connections = {first}"])
    check(version == 1 or n.next() == 0, "left out")
    check(n.at == len(data), "more behind an index")
    return {"major": major, "ended": lists[0], "open": lists[1], "landmarks": landmarks}
def main(folder):
    index, failed = json.loads((folder / "index.json").read_text()), 0
    for case in index["objects"]:
        try:
            keys = Keys(folder / case["key"], bytes.fromhex(index["realm"]))
            sealed = Object((folder / case["file"]).read_bytes(), keys, folder, case["kind"], case["name"],
                            bytes.fromhex(case.get("repository", "")))
            out, extra = sealed.tail() if case["kind"] == 3 else sealed.whole()
            seen = {"sha256": hashlib.sha256(out).hexdigest(), "extra": extra.decode()}
            if case["kind"] == 10: seen["index"] = said(out)
        except Bad as why: seen = {"refused": str(why)}
        fine = "refused" in seen if case.get("refused") else all(case.get(k) == seen.get(k) for k in ("sha256", "extra", "index"))
        print("ok  " if fine else "BAD ", case["file"], "as", case["name"], seen.get("refused", ""))
        failed += not fine
    return failed > 0
sys.exit(main(Path(sys.argv[1])))
