"""Check a finished run against its slides: tiles read by other code, encoded by PyTorch in fp32."""

from slide2vec.audit.certificate import verify_certificate, write_certificate
from slide2vec.audit.check import audit_run

__all__ = ["audit_run", "verify_certificate", "write_certificate"]
