"""Answers the questions for names of one machine: from its own table, by a refusal, or from the host's name servers.

Every question is a guest's bytes.  One that its policy does not allow never leaves the gate.
"""

from __future__ import annotations

import dns.exception
import dns.flags
import dns.message
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset

from podflare.egress.journal import Journal
from podflare.egress.names import NameTable
from podflare.egress.policy import Policy, normal_name
from podflare.egress.resolver import Resolver, Unresolved
from podflare.egress.substitution import Substitution
from podflare.errors import BadRequest
from podflare.wire.egress import ALLOWED, FAILED, REFUSED

MAX_PENDING = 64
"""Questions of one machine that wait for the host's name servers."""
_TTL_S = 60
_PLAIN_BYTES = 512
"""What a datagram may hold if the question does not say more (RFC 1035)."""
_MAX_DATAGRAM = 4096


class Questions:
    """One machine's view of the names of the world."""

    def __init__(
        self, policy: Policy, names: NameTable, secrets: Substitution, resolver: Resolver, journal: Journal
    ) -> None:
        self._policy = policy
        self._names = names
        self._secrets = secrets
        self._resolver = resolver
        self._journal = journal
        self._pending = 0

    async def answer(self, wire: bytes, *, stream: bool) -> bytes | None:
        """The answer to one question; None if it is none that could be answered.

        Args:
            stream: it came over TCP, so that the answer may be long.
        """
        try:
            query = dns.message.from_wire(wire)
            if query.flags & dns.flags.QR or query.opcode() != dns.opcode.QUERY or len(query.question) != 1:
                return None
            answer = await self._answer(query)
            limit = 65535 if stream else min(max(query.payload, _PLAIN_BYTES), _MAX_DATAGRAM)
            return answer.to_wire(max_size=limit, prefer_truncation=True)
        except (dns.exception.DNSException, ValueError, LookupError, TypeError, NotImplementedError):
            # What the library raises for bytes that are no message, or cannot be written again.
            return None

    async def _answer(self, query: dns.message.Message) -> dns.message.Message:
        question = query.question[0]
        asked = question.name.to_text(omit_final_dot=True)
        answer = dns.message.make_response(query, recursion_available=True)
        try:
            name = normal_name(asked)
        except BadRequest:
            name = ""  # no host's, so on no list
        by_table = self._policy.entries is not True or self._secrets.knows(name)
        if question.rdclass != dns.rdataclass.IN:
            answer.set_rcode(dns.rcode.REFUSED)
        elif by_table:
            if not name or not self._policy.knows_name(name):
                self._journal.note("dns", REFUSED, f"not on the list: {self._policy.describe()}", host=asked)
                answer.set_rcode(dns.rcode.NXDOMAIN)
            elif question.rdtype == dns.rdatatype.A:
                self._journal.note("dns", ALLOWED, host=name)
                answer.answer.append(
                    dns.rrset.from_text(question.name, _TTL_S, "IN", "A", str(self._names.address_of(name)))
                )
        elif question.rdtype != dns.rdatatype.AAAA:  # there is no IPv6 inside
            await self._forward(question, asked, answer)
        return answer

    async def _forward(self, question: dns.rrset.RRset, asked: str, answer: dns.message.Message) -> None:
        if self._pending >= MAX_PENDING:
            self._journal.note("dns", FAILED, f"more than {MAX_PENDING} questions at a time", host=asked)
            answer.set_rcode(dns.rcode.SERVFAIL)
            return
        self._pending += 1
        try:
            found = await self._resolver.ask(question.name, question.rdtype)
        except Unresolved as error:
            self._journal.note("dns", FAILED, str(error), host=asked)
            answer.set_rcode(dns.rcode.SERVFAIL)
        else:
            self._journal.note("dns", ALLOWED, host=asked)
            answer.set_rcode(found.rcode())
            answer.answer, answer.authority = found.answer, found.authority
        finally:
            self._pending -= 1
