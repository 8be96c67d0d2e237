"""Decodes JPEG files with simplejpeg."""
import PIL.Image

from vora_jax.types import UserError


def check_decoder(decoder: str) -> None:
    """UserError if the packages of an `ImagePolicy.decoder` are not there."""
    if decoder == 'simplejpeg':
        _library()


def decode_jpeg(content: bytes) -> PIL.Image.Image | None:
    """The pixels in RGB, not yet turned upright; None if the library finds anything odd about the file.

    The slow and accurate transforms are asked for, so the pixels are Pillow's where both libraries have the same version
    of libjpeg-turbo inside.
    """
    library = _library()
    try:  # four bytes a pixel are how Pillow keeps its pictures: a copy instead of a conversion
        pixels = library.decode_jpeg(content, colorspace='RGBX', fastdct=False, fastupsample=False)
    except ValueError:
        return None
    return PIL.Image.frombytes('RGB', pixels.shape[1::-1], pixels, 'raw', 'RGBX')


def _library():
    try:
        import simplejpeg
    except ImportError as error:
        raise UserError("ImagePolicy.decoder 'simplejpeg' needs the package simplejpeg; install vora_jax[jpeg], or use "
                        "the decoder 'pillow'.") from error
    return simplejpeg
