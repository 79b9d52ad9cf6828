from typing import NoReturn


class FP8GlobalStateManager:
    """8-bit formats are never on."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


def fp8_autocast(*arguments: object, **keywords: object) -> NoReturn:
    raise NotImplementedError("8-bit formats")


def fp8_model_init(*arguments: object, **keywords: object) -> NoReturn:
    raise NotImplementedError("8-bit formats")
