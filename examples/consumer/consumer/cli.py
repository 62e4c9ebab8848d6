"""Ask, stream and embed from the command line."""

import sys

import sage.llm.unified_client
from sage.llm import UnifiedInferenceClient


def main() -> None:
    """Run all three against the URL that is given."""
    client = UnifiedInferenceClient.create(control_plane_url=sys.argv[1], default_llm_model="mock")
    assert isinstance(client, sage.llm.unified_client.UnifiedInferenceClient)
    options = {"max_tokens": 24, "temperature": 0.0, "seed": 7}
    answer = client.chat([{"role": "user", "content": "Good morning"}], **options)
    print("chat:", answer["choices"][0]["message"]["content"])
    print("generate:", client.generate("Once upon a time", **options))
    pieces = list(client.chat([{"role": "user", "content": "Good morning"}], stream=True, **options))
    print("stream:", "".join(str(piece) for piece in pieces))
    print("models:", client.models())
    client.close()


if __name__ == "__main__":
    main()
