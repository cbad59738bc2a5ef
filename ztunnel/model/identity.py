"""Who a workload is (SPIFFE-ID s2, as Istio issues them)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType, Self

TrustDomain = NewType("TrustDomain", str)
Namespace = NewType("Namespace", str)
ServiceAccount = NewType("ServiceAccount", str)

SCHEME = "spiffe://"


@dataclass(frozen=True, slots=True, order=True)
class Identity:
    """Who a workload is: `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`."""

    trust_domain: TrustDomain
    namespace: Namespace
    service_account: ServiceAccount

    @classmethod
    def parse(cls, uri: str) -> Self:
        """Read a SPIFFE URI; empty namespace and account are legal, as in the reference (7.3).

        Raises:
            ValueError: `uri` is not of the one form Istio issues.
        """
        if uri.startswith(SCHEME):
            match uri[len(SCHEME) :].split("/"):
                case [domain, "ns", namespace, "sa", account]:
                    return cls(TrustDomain(domain), Namespace(namespace), ServiceAccount(account))
                case _:
                    pass
        raise ValueError(f"not an Istio SPIFFE identity: {uri!r}")

    @property
    def principal(self) -> str:
        """The identity as policies spell it: the URI without its scheme."""
        return f"{self.trust_domain}/ns/{self.namespace}/sa/{self.service_account}"

    def __str__(self) -> str:
        return SCHEME + self.principal
